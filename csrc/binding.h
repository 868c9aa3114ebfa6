// Functions of C++ as functions of a Python module, on CPython's own interface: the headers of a binding library alone take
// several times as long to compile as all that is bound here. Included by bindings.cpp only.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace python {

// Thrown where Python's own error is set already.
struct ErrorIsSet {};

// The exception on its way, as Python's: invalid_argument is a ValueError. For the end of every function that Python calls.
inline PyObject* raise() {
  try {
    throw;
  } catch (const ErrorIsSet&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A new reference, or ErrorIsSet where there is none.
inline PyObject* checked(PyObject* object) {
  if (!object) throw ErrorIsSet{};
  return object;
}

// What a function was called with: arguments by their position alone.
class Arguments {
 public:
  Arguments(const char* name, PyObject* const* values, Py_ssize_t count, Py_ssize_t wanted)
      : name_(name), values_(values) {
    if (count == wanted) return;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, wanted, count);
    throw ErrorIsSet{};
  }

  // Argument `i`, counted from 0. A whole number does for T double too, True and False for any; a TypeError says what does
  // not, a ValueError which number T does not hold.
  template <typename T>
  T get(Py_ssize_t i) const;

 private:
  [[noreturn]] void refuse(PyObject* error, Py_ssize_t i, const char* what) const {
    PyErr_Format(error, "%s: argument %zd must be %s, got %R", name_, i + 1, what, values_[i]);
    throw ErrorIsSet{};
  }

  // The argument as Python's int, a new reference.
  PyObject* whole(Py_ssize_t i) const {
    PyObject* number = PyNumber_Index(values_[i]);
    if (number) return number;
    PyErr_Clear();
    refuse(PyExc_TypeError, i, "a whole number");
  }

  const char* name_;
  PyObject* const* values_;
};

template <>
inline long long Arguments::get<long long>(Py_ssize_t i) const {
  PyObject* number = whole(i);
  int beyond = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number, &beyond);
  Py_DECREF(number);
  if (beyond) refuse(PyExc_ValueError, i, "a number of 64 bits");
  return value;
}

template <>
inline int Arguments::get<int>(Py_ssize_t i) const {
  const long long value = get<long long>(i);
  if (value != static_cast<int>(value)) refuse(PyExc_ValueError, i, "a number of 32 bits");
  return static_cast<int>(value);
}

template <>
inline bool Arguments::get<bool>(Py_ssize_t i) const {
  return get<long long>(i) != 0;
}

template <>
inline std::uintptr_t Arguments::get<std::uintptr_t>(Py_ssize_t i) const {
  PyObject* number = whole(i);
  const std::uintptr_t value = PyLong_AsSize_t(number);
  Py_DECREF(number);
  if (!PyErr_Occurred()) return value;
  PyErr_Clear();
  refuse(PyExc_ValueError, i, "an address");
}

template <>
inline double Arguments::get<double>(Py_ssize_t i) const {
  const double value = PyFloat_AsDouble(values_[i]);
  if (value != -1 || !PyErr_Occurred()) return value;
  PyErr_Clear();
  refuse(PyExc_TypeError, i, "a number");
}

template <>
inline std::string Arguments::get<std::string>(Py_ssize_t i) const {
  if (!PyUnicode_Check(values_[i])) refuse(PyExc_TypeError, i, "a string");
  const char* text = PyUnicode_AsUTF8(values_[i]);
  if (!text) throw ErrorIsSet{};
  return text;
}

// Other threads of Python run while this is there.
class WithoutTheGil {
 public:
  WithoutTheGil() : state_(PyEval_SaveThread()) {}
  ~WithoutTheGil() { PyEval_RestoreThread(state_); }
  WithoutTheGil(const WithoutTheGil&) = delete;
  WithoutTheGil& operator=(const WithoutTheGil&) = delete;

 private:
  PyThreadState* state_;
};

inline PyObject* object_of(long long value) { return PyLong_FromLongLong(value); }
inline PyObject* object_of(const char* value) { return PyUnicode_FromString(value); }

namespace detail {
template <typename R, typename... P, std::size_t... I>
PyObject* call(const char* name, R (*function)(P...), PyObject* const* values, Py_ssize_t count,
               std::index_sequence<I...>) {
  try {
    [[maybe_unused]] const Arguments arguments(name, values, count, sizeof...(P));
    if constexpr (std::is_void_v<R>) {
      function(arguments.get<P>(I)...);
      Py_RETURN_NONE;
    } else {
      return object_of(function(arguments.get<P>(I)...));
    }
  } catch (...) {
    return raise();
  }
}
}  // namespace detail

// What Python gets of a call of `function`.
template <typename R, typename... P>
PyObject* call(const char* name, R (*function)(P...), PyObject* const* values, Py_ssize_t count) {
  return detail::call(name, function, values, count, std::make_index_sequence<sizeof...(P)>());
}

using Method = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// An entry of a module's table of functions.
inline PyMethodDef method(const char* name, Method function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace python
