// epigraf_fast._C: the launchers, on raw pointers. The only file that knows Python, so every argument of every launcher is
// named here.
//
// What cannot be right never reaches a kernel: sizes, codes, null and misaligned pointers are refused with a ValueError.
// The GIL is released while a launcher works.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "bias_act.h"
#include "composite.h"
#include "decode_triplane.h"
#include "layer_epilogue.h"
#include "modulation.h"
#include "sample_importance.h"
#include "upfirdn2d.h"
#if defined(EPIGRAF_DRIVER)
#include "driver/driver.h"
#endif

namespace py = pybind11;

namespace {

using epigraf::DType;
using epigraf::i64;
using Pointer = std::uintptr_t;

void require(bool good, const std::string& op, const std::string& what) {
  if (!good) throw py::value_error(op + ": " + what);
}

constexpr i64 kMostElements = i64(1) << 48, kMostSide = 1 << 24;

// Names the op in what is refused.
struct Check {
  std::string op;

  DType dtype(int code) const {
    require(code >= 0 && code <= 3, op, "dtype must be a code from 0 to 3, got " + std::to_string(code));
    return static_cast<DType>(code);
  }
  int index(const char* name, int value, int end) const {
    require(value >= 0 && value < end, op,
            std::string(name) + " must be from 0 to " + std::to_string(end - 1) + ", got " + std::to_string(value));
    return value;
  }
  i64 size(const char* name, i64 value, i64 least = 0, i64 most = kMostElements) const {
    require(value >= least && value <= most, op,
            std::string(name) + " must be at least " + std::to_string(least) + " and at most " +
                std::to_string(most) + ", got " + std::to_string(value));
    return value;
  }
  // Small enough that products of a few sides keep to 64 bits.
  i64 side(const char* name, i64 value, i64 least = 0) const { return size(name, value, least, kMostSide); }
  i64 product(const char* name, i64 a, i64 b) const {
    require(b == 0 || a <= kMostElements / b, op, std::string(name) + " must be at most 2^48");
    return a * b;
  }
  // A pointer to `count` elements: may be null if there are none, or where it is optional.
  template <typename P = void*>
  P pointer(const char* name, Pointer value, i64 element_size, i64 count, bool optional = false) const {
    require(value != 0 || optional || count == 0, op, std::string(name) + " must not be a null pointer");
    require(value % static_cast<Pointer>(element_size) == 0, op,
            std::string(name) + " must be aligned to its elements of " + std::to_string(element_size) +
                " bytes, got " + std::to_string(value));
    return reinterpret_cast<P>(value);
  }
};

i64 compute_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Define name_cpu(..., threads) and name_cuda(..., stream); `make` turns what comes before into Args.
template <typename Args, typename... P>
void define_cpu(py::module_& m, const char* name, Args (*make)(const Check&, P...), void (*launch)(const Args&, int)) {
  m.def((std::string(name) + "_cpu").c_str(), [=](P... p, int threads) {
    const Check check{name};
    check.size("threads", threads, 1);
    const Args args = make(check, p...);
    py::gil_scoped_release release;
    launch(args, threads);
  });
}

template <typename Args, typename... P>
void define_cuda(py::module_& m, const char* name, Args (*make)(const Check&, P...),
                 void (*launch)(const Args&, std::uintptr_t)) {
  m.def((std::string(name) + "_cuda").c_str(), [=](P... p, std::uintptr_t stream) {
    const Args args = make(Check{name}, p...);
    py::gil_scoped_release release;
    launch(args, stream);
  });
}

#if defined(EPIGRAF_EMULATED)
#define EPIGRAF_DEFINE_CPU(m, name) static_cast<void>(name)
#else
#define EPIGRAF_DEFINE_CPU(m, name) define_cpu(m, #name, name, epigraf::name##_cpu)
#endif
#if defined(EPIGRAF_CUDA)
#define EPIGRAF_DEFINE(m, name) (EPIGRAF_DEFINE_CPU(m, name), define_cuda(m, #name, name, epigraf::name##_cuda))
#else
#define EPIGRAF_DEFINE(m, name) EPIGRAF_DEFINE_CPU(m, name)
#endif

// ---- bias_act

epigraf::BiasActArgs bias_act_common(const Check& check, int dtype, int act, double gain, double clamp, i64 count,
                                     i64 channels, i64 inner) {
  epigraf::BiasActArgs args{};
  args.dtype = check.dtype(dtype);
  args.act = check.index("act", act, epigraf::base::kActs);
  require(clamp > 0, check.op, "clamp must be positive, got " + std::to_string(clamp));
  args.gain = gain;
  args.clamp = clamp;
  args.count = check.size("count", count);
  args.channels = check.size("channels", channels, count > 0);
  args.inner = check.size("inner", inner, count > 0);
  if (count > 0)
    require(channels <= count && inner <= count / channels && count % (channels * inner) == 0, check.op,
            "count must be a multiple of channels * inner, got " + std::to_string(count) + ", " +
                std::to_string(channels) + " and " + std::to_string(inner));
  return args;
}

epigraf::BiasActArgs bias_act_fwd(const Check& check, Pointer x, Pointer bias, Pointer y, int dtype, int act,
                                  double gain, double clamp, i64 count, i64 channels, i64 inner) {
  auto args = bias_act_common(check, dtype, act, gain, clamp, count, channels, inner);
  const i64 size = epigraf::size_of(args.dtype), compute = compute_size(args.dtype);
  args.x = check.pointer("x", x, size, count);
  args.bias = check.pointer("bias", bias, compute, channels, true);
  args.y = check.pointer("y", y, size, count);
  return args;
}

epigraf::BiasActArgs bias_act_bwd(const Check& check, Pointer grad_y, Pointer x, Pointer bias, Pointer grad_x,
                                  Pointer grad_bias, Pointer partials, int dtype, int act, double gain, double clamp,
                                  i64 count, i64 channels, i64 inner) {
  auto args = bias_act_common(check, dtype, act, gain, clamp, count, channels, inner);
  const i64 size = epigraf::size_of(args.dtype), compute = compute_size(args.dtype);
  const bool constant = act == epigraf::base::kLinear && clamp == HUGE_VAL;
  args.grad_y = check.pointer("grad_y", grad_y, size, count);
  args.x = check.pointer("x", x, size, count, constant);
  args.bias = check.pointer("bias", bias, compute, channels, true);
  args.grad_x = check.pointer("grad_x", grad_x, size, count);
  args.grad_bias = check.pointer("grad_bias", grad_bias, compute, channels, true);
  args.partials = check.pointer("partials", partials, compute, count, grad_bias == 0);
  return args;
}

epigraf::BiasActArgs bias_act_double_bwd(const Check& check, Pointer grad_grad_x, Pointer grad_grad_bias,
                                         Pointer grad_y, Pointer x, Pointer bias, Pointer grad_grad_y, Pointer grad_x,
                                         Pointer grad_bias, Pointer partials, int dtype, int act, double gain,
                                         double clamp, i64 count, i64 channels, i64 inner) {
  auto args = bias_act_common(check, dtype, act, gain, clamp, count, channels, inner);
  const i64 size = epigraf::size_of(args.dtype), compute = compute_size(args.dtype);
  const bool constant = act == epigraf::base::kLinear && clamp == HUGE_VAL;
  args.grad_grad_x = check.pointer("grad_grad_x", grad_grad_x, size, count, true);
  args.grad_grad_bias = check.pointer("grad_grad_bias", grad_grad_bias, compute, channels, true);
  args.grad_y = check.pointer("grad_y", grad_y, size, count);
  args.x = check.pointer("x", x, size, count, constant);
  args.bias = check.pointer("bias", bias, compute, channels, true);
  args.grad_grad_y = check.pointer("grad_grad_y", grad_grad_y, size, count, true);
  args.grad_x = check.pointer("grad_x", grad_x, size, count, true);
  args.grad_bias = check.pointer("grad_bias", grad_bias, compute, channels, true);
  args.partials = check.pointer("partials", partials, compute, count, grad_bias == 0);
  return args;
}

void bind_bias_act(py::module_& m) {
  m.attr("BIAS_ACT_ACTIVATIONS") =
      py::make_tuple("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish");
  m.def("bias_act_parts", [](i64 count, i64 channels, i64 inner) {
    const auto args = bias_act_common(Check{"bias_act_parts"}, 0, 0, 1, 1, count, channels, inner);
    return args.count > 0 ? epigraf::base::bias_act_parts(args.count, args.channels, args.inner) : 0;
  });
  EPIGRAF_DEFINE(m, bias_act_fwd);
  EPIGRAF_DEFINE(m, bias_act_bwd);
  EPIGRAF_DEFINE(m, bias_act_double_bwd);
}

// ---- upfirdn2d

epigraf::UpFirDnArgs upfirdn2d(const Check& check, Pointer x, Pointer taps, Pointer added, Pointer bias, Pointer y,
                               int dtype, int added_dtype, i64 batch, i64 channels, i64 in_height, i64 in_width,
                               i64 out_height, i64 out_width, i64 taps_y, i64 taps_x, bool separable,
                               bool channels_last, bool flip, i64 up, i64 down, i64 pad_x, i64 pad_y, double gain,
                               double clamp) {
  epigraf::UpFirDnArgs args{};
  args.dtype = check.dtype(dtype);
  args.added_dtype = check.dtype(added_dtype);
  require(added == 0 || added_dtype == dtype || args.added_dtype == DType::f16, check.op,
          "added_dtype must be dtype or that of fp16, got " + std::to_string(added_dtype));
  require(clamp > 0, check.op, "clamp must be positive, got " + std::to_string(clamp));
  args.clamp = clamp;
  args.batch = check.size("batch", batch);
  args.channels = check.size("channels", channels);
  args.in_height = check.side("in_height", in_height);
  args.in_width = check.side("in_width", in_width);
  args.out_height = check.side("out_height", out_height);
  args.out_width = check.side("out_width", out_width);
  args.taps_y = check.side("taps_y", taps_y, 1);
  args.taps_x = check.side("taps_x", taps_x, 1);
  require(!separable || taps_y == taps_x, check.op,
          "taps_y must be taps_x of a separable filter, got " + std::to_string(taps_y) + " and " +
              std::to_string(taps_x));
  args.separable = separable;
  args.channels_last = channels_last;
  args.flip = flip;
  args.up = check.side("up", up, 1);
  args.down = check.side("down", down, 1);
  args.pad_x = check.side("pad_x", pad_x, -kMostSide);
  args.pad_y = check.side("pad_y", pad_y, -kMostSide);
  args.gain = gain;
  const i64 size = epigraf::size_of(args.dtype);
  const i64 images = check.product("batch * channels", batch, channels);
  const i64 inputs = check.product("elements of x", images, in_height * in_width);
  const i64 outputs = check.product("elements of y", images, out_height * out_width);
  args.x = check.pointer("x", x, size, inputs);
  args.taps = check.pointer("taps", taps, compute_size(args.dtype), taps_x);
  args.added = check.pointer("added", added, epigraf::size_of(args.added_dtype), outputs, true);
  args.bias = check.pointer("bias", bias, compute_size(args.dtype), channels, true);
  args.y = check.pointer("y", y, size, outputs);
  return args;
}

void bind_upfirdn2d(py::module_& m) { EPIGRAF_DEFINE(m, upfirdn2d); }

// ---- layer_epilogue

// The sizes and numbers that follow the tensors of every launcher of the layer's epilogue.
struct LayerShape {
  epigraf::LayerEpilogueArgs args{};
  i64 size, compute, count, x_count, map, vectors;

  LayerShape(const Check& check, int dtype, bool channels_last, bool blur, double slope, double gain, double clamp,
             i64 batch, i64 channels, i64 height, i64 width, i64 noise_stride) {
    args.dtype = check.dtype(dtype);
    args.channels_last = channels_last;
    args.slope = slope;
    args.gain = gain;
    require(clamp > 0, check.op, "clamp must be positive, got " + std::to_string(clamp));
    args.clamp = clamp;
    args.batch = check.side("batch", batch);
    args.channels = check.side("channels", channels);
    args.height = check.side("height", height);
    args.width = check.side("width", width);
    const i64 margin = blur ? 1 : 0;
    map = check.product("batch * pixels", check.product("pixels", height, width), batch);
    vectors = check.product("batch * channels", batch, channels);
    count = check.product("the size of the output", map, channels);
    x_count = check.product("the size of x", check.product("pixels", height + margin, width + margin), vectors);
    require(noise_stride == 0 || noise_stride == height * width, check.op,
            "noise_stride must be 0 or height * width, got " + std::to_string(noise_stride));
    args.noise_stride = noise_stride;
    size = epigraf::size_of(args.dtype), compute = compute_size(args.dtype);
  }
  // What all orders read.
  void inputs(const Check& check, Pointer x, Pointer taps, Pointer demod, Pointer bias, Pointer noise, Pointer strength,
              Pointer style0, Pointer style1, bool from_outputs = false) {
    args.x = check.pointer("x", x, size, x_count, from_outputs);
    args.taps = check.pointer("taps", taps, compute, 4, true);
    args.demod = check.pointer("demod", demod, compute, vectors, true);
    args.bias = check.pointer("bias", bias, compute, args.channels, true);
    args.noise = check.pointer("noise", noise, compute, map, true);
    args.strength = check.pointer("strength", strength, compute, 1, true);
    args.style[0] = check.pointer("style0", style0, compute, vectors, true);
    args.style[1] = check.pointer("style1", style1, compute, vectors, true);
  }
  // The gradients of vectors and noise, and the scratch memory that they need.
  void sums(const Check& check, Pointer demod, Pointer bias, Pointer strength, Pointer style0, Pointer style1,
            Pointer noise, Pointer partials) {
    args.grad_demod = check.pointer("grad_demod", demod, compute, vectors, true);
    args.grad_bias = check.pointer("grad_bias", bias, compute, args.channels, true);
    args.grad_strength = check.pointer("grad_strength", strength, compute, 1, true);
    args.grad_style[0] = check.pointer("grad_style0", style0, compute, vectors, true);
    args.grad_style[1] = check.pointer("grad_style1", style1, compute, vectors, true);
    args.map = check.pointer("map", noise, compute, map, true);
    require(style1 == 0 || args.grad_out[1], check.op, "grad_style1 must be null where grad_out1 is");
    args.partials = check.pointer("partials", partials, compute, count);
  }
};

epigraf::LayerEpilogueArgs layer_epilogue_fwd(const Check& check, Pointer x, Pointer taps, Pointer demod, Pointer bias,
                                              Pointer noise, Pointer strength, Pointer style0, Pointer style1,
                                              Pointer out0, Pointer out1, int dtype, bool channels_last, double slope,
                                              double gain, double clamp, i64 batch, i64 channels, i64 height, i64 width,
                                              i64 noise_stride) {
  LayerShape shape(check, dtype, channels_last, taps != 0, slope, gain, clamp, batch, channels, height, width,
                   noise_stride);
  shape.inputs(check, x, taps, demod, bias, noise, strength, style0, style1);
  shape.args.out[0] = check.pointer("out0", out0, shape.size, shape.count);
  shape.args.out[1] = check.pointer("out1", out1, shape.size, shape.count, true);
  return shape.args;
}

epigraf::LayerEpilogueArgs layer_epilogue_bwd(const Check& check, Pointer x, Pointer taps, Pointer demod, Pointer bias,
                                              Pointer noise, Pointer strength, Pointer style0, Pointer style1,
                                              Pointer out0, Pointer out1, Pointer grad_out0, Pointer grad_out1,
                                              Pointer grad_x, Pointer grad_demod, Pointer grad_bias,
                                              Pointer grad_strength, Pointer grad_style0, Pointer grad_style1,
                                              Pointer map, Pointer partials, int dtype, bool channels_last,
                                              double slope, double gain, double clamp, i64 batch, i64 channels,
                                              i64 height, i64 width, i64 noise_stride) {
  LayerShape shape(check, dtype, channels_last, taps != 0, slope, gain, clamp, batch, channels, height, width,
                   noise_stride);
  const bool outputs = out0 != 0 || out1 != 0;
  shape.inputs(check, x, taps, demod, bias, noise, strength, style0, style1, outputs);
  require((x == 0) == outputs || shape.count == 0, check.op, "either x or outputs must be given, and the others be null");
  require(out1 == 0 || grad_out1 != 0, check.op, "out1 must be null where grad_out1 is");
  require(slope > 0 || !outputs, check.op, "slope must be positive where outputs take the place of x");
  shape.args.out[0] = check.pointer("out0", out0, shape.size, shape.count, true);
  shape.args.out[1] = check.pointer("out1", out1, shape.size, shape.count, true);
  shape.args.grad_out[0] = check.pointer("grad_out0", grad_out0, shape.size, shape.count);
  shape.args.grad_out[1] = check.pointer("grad_out1", grad_out1, shape.size, shape.count, true);
  shape.sums(check, grad_demod, grad_bias, grad_strength, grad_style0, grad_style1, map, partials);
  shape.args.grad_x = check.pointer("grad_x", grad_x, shape.size, shape.x_count);
  return shape.args;
}

epigraf::LayerEpilogueArgs layer_epilogue_double_bwd(
    const Check& check, Pointer x, Pointer demod, Pointer bias, Pointer noise, Pointer strength, Pointer style0,
    Pointer style1, Pointer grad_out0, Pointer grad_out1, Pointer dot_x, Pointer dot_demod, Pointer dot_bias,
    Pointer dot_noise, Pointer dot_style0, Pointer dot_style1, Pointer grad_grad_out0, Pointer grad_grad_out1,
    Pointer grad_x, Pointer grad_demod, Pointer grad_bias, Pointer grad_strength, Pointer grad_style0,
    Pointer grad_style1, Pointer map, Pointer gradient_map, Pointer partials, int dtype, bool channels_last,
    double slope, double gain, double clamp, i64 batch, i64 channels, i64 height, i64 width, i64 noise_stride) {
  LayerShape shape(check, dtype, channels_last, false, slope, gain, clamp, batch, channels, height, width, noise_stride);
  shape.inputs(check, x, 0, demod, bias, noise, strength, style0, style1);
  auto& args = shape.args;
  const bool two = grad_out1 != 0;
  args.grad_out[0] = check.pointer("grad_out0", grad_out0, shape.size, shape.count);
  args.grad_out[1] = check.pointer("grad_out1", grad_out1, shape.size, shape.count, true);
  shape.sums(check, grad_demod, grad_bias, grad_strength, grad_style0, grad_style1, map, partials);
  args.dot_x = check.pointer("dot_x", dot_x, shape.size, shape.count, true);
  args.dot_demod = check.pointer("dot_demod", dot_demod, shape.compute, shape.vectors, true);
  args.dot_bias = check.pointer("dot_bias", dot_bias, shape.compute, channels, true);
  args.dot_noise = check.pointer("dot_noise", dot_noise, shape.compute, shape.map, true);
  args.dot_style[0] = check.pointer("dot_style0", dot_style0, shape.compute, shape.vectors, true);
  args.dot_style[1] = check.pointer("dot_style1", dot_style1, shape.compute, shape.vectors, true);
  args.grad_grad_out[0] = check.pointer("grad_grad_out0", grad_grad_out0, shape.size, shape.count);
  args.grad_grad_out[1] = check.pointer("grad_grad_out1", grad_grad_out1, shape.size, shape.count, !two);
  args.grad_x = check.pointer("grad_x", grad_x, shape.size, shape.count);
  args.gradient_map = check.pointer("gradient_map", gradient_map, shape.compute, shape.map, true);
  return args;
}

void bind_layer_epilogue(py::module_& m) {
  // How many numbers `partials` must hold.
  m.def("layer_epilogue_partials", [](i64 batch, i64 channels, i64 height, i64 width, bool blur, bool cuda) {
    const i64 parts = cuda ? epigraf::base::layer_epilogue_parts_cuda(height, width, blur)
                           : epigraf::base::layer_epilogue_blocks(height, blur);
    return batch * parts * epigraf::base::kLayerSums * channels;
  });
  EPIGRAF_DEFINE(m, layer_epilogue_fwd);
  EPIGRAF_DEFINE(m, layer_epilogue_bwd);
  EPIGRAF_DEFINE(m, layer_epilogue_double_bwd);
}

// ---- modulation

epigraf::ModulationArgs modulation_common(const Check& check, Pointer weight, Pointer style, Pointer scale,
                                          Pointer energy, Pointer demod, int dtype, i64 batch, i64 c_out, i64 c_in,
                                          i64 taps) {
  epigraf::ModulationArgs args{};
  args.dtype = check.dtype(dtype);
  require(args.dtype == DType::f32 || args.dtype == DType::f64, check.op, "dtype must be that of fp32 or fp64");
  args.batch = check.side("batch", batch);
  args.c_out = check.side("c_out", c_out);
  args.c_in = check.side("c_in", c_in, 1);
  args.taps = check.side("taps", taps);
  const i64 size = epigraf::size_of(args.dtype);
  args.weight = check.pointer("weight", weight, size, check.product("weight", check.product("channels", c_out, c_in), taps));
  args.style = check.pointer("style", style, size, check.product("style", batch, c_in));
  args.scale = check.pointer("scale", scale, size, batch, true);
  args.energy = check.pointer("energy", energy, size, c_out * c_in);
  args.demod = check.pointer("demod", demod, size, check.product("demod", batch, c_out));
  return args;
}

epigraf::ModulationArgs modulation_fwd(const Check& check, Pointer weight, Pointer given, Pointer style, Pointer scale,
                                       Pointer energy, Pointer demod, int dtype, i64 batch, i64 c_out, i64 c_in,
                                       i64 taps, double epsilon, double tiny, bool known) {
  auto args = modulation_common(check, weight, given, scale, energy, demod, dtype, batch, c_out, c_in, taps);
  require(epsilon > 0, check.op, "epsilon must be positive, got " + std::to_string(epsilon));
  require(tiny > 0, check.op, "tiny must be positive");
  args.epsilon = epsilon;
  args.tiny = tiny;
  args.known = known;
  args.given = args.style;
  args.style = check.pointer("style", style, epigraf::size_of(args.dtype), batch * c_in, scale == 0);
  return args;
}

epigraf::ModulationArgs modulation_bwd(const Check& check, Pointer weight, Pointer style, Pointer scale, Pointer energy,
                                       Pointer demod, Pointer grad_demod, Pointer grad_weight, Pointer grad_style,
                                       Pointer grad_weight_out, Pointer grad_style_out, int dtype, i64 batch, i64 c_out,
                                       i64 c_in, i64 taps, i64 stride_out, i64 stride_in, i64 stride_tap) {
  auto args = modulation_common(check, weight, style, scale, energy, demod, dtype, batch, c_out, c_in, taps);
  const i64 size = epigraf::size_of(args.dtype), weights = c_out * c_in * taps;
  args.grad_demod = check.pointer("grad_demod", grad_demod, size, batch * c_out);
  args.grad_weight = check.pointer("grad_weight", grad_weight, size, weights, true);
  args.grad_style = check.pointer("grad_style", grad_style, size, batch * c_in, true);
  args.grad_weight_out = check.pointer("grad_weight_out", grad_weight_out, size, weights, true);
  args.grad_style_out = check.pointer("grad_style_out", grad_style_out, size, batch * c_in, true);
  args.stride_out = check.size("stride_out", stride_out);
  args.stride_in = check.size("stride_in", stride_in);
  args.stride_tap = check.size("stride_tap", stride_tap);
  return args;
}

void bind_modulation(py::module_& m) {
  EPIGRAF_DEFINE(m, modulation_fwd);
  EPIGRAF_DEFINE(m, modulation_bwd);
}

// ---- decode_triplane

epigraf::DecodeTriplaneArgs decode_triplane_common(const Check& check, Pointer planes, Pointer origins,
                                                   Pointer directions, Pointer t, Pointer w0, Pointer b0, Pointer w1,
                                                   Pointer first, int dtype, i64 batch, i64 rays, i64 samples,
                                                   i64 channels, i64 height, i64 width, i64 hidden, i64 outputs,
                                                   double cube_scale, i64 whole_height, i64 whole_width) {
  epigraf::DecodeTriplaneArgs args{};
  args.dtype = check.dtype(dtype);
  require(args.dtype == DType::f32 || args.dtype == DType::f64, check.op, "dtype must be that of fp32 or fp64");
  require(cube_scale > 0, check.op, "cube_scale must be positive, got " + std::to_string(cube_scale));
  args.cube_scale = cube_scale;
  args.batch = check.side("batch", batch);
  args.rays = check.size("rays", rays);
  args.samples = check.side("samples", samples);
  args.channels = check.side("channels", channels, 1);
  args.height = check.side("height", height, 1);
  args.width = check.side("width", width, 1);
  args.hidden = check.side("hidden", hidden);
  args.outputs = check.side("outputs", outputs);
  require((directions == 0) == (t == 0) || batch * rays * samples == 0, check.op, "directions and t must be given together");
  require(directions != 0 || samples == 1 || batch * rays * samples == 0, check.op,
          "samples must be 1 without directions, got " + std::to_string(samples));
  const i64 size = epigraf::size_of(args.dtype);
  const i64 of_rays = check.product("batch * rays", batch, rays), points = check.product("points", of_rays, samples);
  check.product("features", points, std::max({channels, hidden, outputs}));
  const i64 texels = check.product("texels", batch, height * width);
  args.planes = check.pointer("planes", planes, size, check.product("planes", texels, 3 * channels));
  args.origins = check.pointer("origins", origins, size, of_rays * 3);
  args.directions = check.pointer("directions", directions, size, of_rays * 3, true);
  args.t = check.pointer("t", t, size, points, true);
  args.w0 = check.pointer("w0", w0, size, check.product("w0", hidden, channels));
  args.b0 = check.pointer("b0", b0, size, hidden);
  args.w1 = check.pointer("w1", w1, size, check.product("w1", outputs, hidden));
  args.first = check.pointer<i64*>("first", first, sizeof(i64), batch * 2, true);
  args.whole_height = check.side("whole_height", whole_height, height);
  args.whole_width = check.side("whole_width", whole_width, width);
  for (i64 i = 0; args.first && i < batch; i++)
    require(args.first[i * 2] >= 0 && args.first[i * 2] <= whole_height - height && args.first[i * 2 + 1] >= 0 &&
                args.first[i * 2 + 1] <= whole_width - width,
            check.op, "first must leave room for the stored texels in whole planes");
  require(args.first != nullptr || (whole_height == height && whole_width == width) || batch == 0, check.op,
          "whole_height and whole_width must be height and width without first");
  return args;
}

epigraf::DecodeTriplaneArgs decode_triplane_fwd(const Check& check, Pointer planes, Pointer origins, Pointer directions,
                                                Pointer t, Pointer w0, Pointer b0, Pointer w1, Pointer b1, Pointer y,
                                                Pointer first, int dtype, i64 batch, i64 rays, i64 samples,
                                                i64 channels, i64 height, i64 width, i64 hidden, i64 outputs,
                                                double cube_scale, i64 whole_height, i64 whole_width) {
  auto args = decode_triplane_common(check, planes, origins, directions, t, w0, b0, w1, first, dtype, batch, rays,
                                     samples, channels, height, width, hidden, outputs, cube_scale, whole_height,
                                     whole_width);
  const i64 size = epigraf::size_of(args.dtype);
  args.b1 = check.pointer("b1", b1, size, outputs);
  args.y = check.pointer("y", y, size, batch * rays * samples * outputs);
  return args;
}

epigraf::DecodeTriplaneArgs decode_triplane_bwd(const Check& check, Pointer planes, Pointer origins, Pointer directions,
                                                Pointer t, Pointer w0, Pointer b0, Pointer w1, Pointer grad_y,
                                                Pointer grad_planes, Pointer grad_w0, Pointer grad_b0, Pointer grad_w1,
                                                Pointer grad_b1, Pointer first, int dtype, i64 batch, i64 rays,
                                                i64 samples, i64 channels, i64 height, i64 width, i64 hidden,
                                                i64 outputs, double cube_scale, i64 whole_height, i64 whole_width) {
  auto args = decode_triplane_common(check, planes, origins, directions, t, w0, b0, w1, first, dtype, batch, rays,
                                     samples, channels, height, width, hidden, outputs, cube_scale, whole_height,
                                     whole_width);
  const i64 size = epigraf::size_of(args.dtype);
  const bool network = grad_w0 != 0 || grad_b0 != 0 || grad_w1 != 0 || grad_b1 != 0;
  args.grad_y = check.pointer("grad_y", grad_y, size, batch * rays * samples * outputs);
  args.grad_planes = check.pointer("grad_planes", grad_planes, size, batch * height * width * 3 * channels, true);
  args.grad_w0 = check.pointer("grad_w0", grad_w0, size, hidden * channels, !network);
  args.grad_b0 = check.pointer("grad_b0", grad_b0, size, hidden, !network);
  args.grad_w1 = check.pointer("grad_w1", grad_w1, size, outputs * hidden, !network);
  args.grad_b1 = check.pointer("grad_b1", grad_b1, size, outputs, !network);
  return args;
}

void bind_decode_triplane(py::module_& m) {
  EPIGRAF_DEFINE_CPU(m, decode_triplane_fwd);
  EPIGRAF_DEFINE_CPU(m, decode_triplane_bwd);
}

// ---- what runs along rays

epigraf::DensitySettings density_settings(const Check& check, bool relu, double softplus_beta, double density_shift,
                                          double last_interval) {
  require(softplus_beta > 0, check.op, "softplus_beta must be positive, got " + std::to_string(softplus_beta));
  require(last_interval >= 0, check.op, "last_interval must not be negative, got " + std::to_string(last_interval));
  return {relu, softplus_beta, density_shift, last_interval};
}

// The arguments of composite that both ways share.
struct CompositeShape {
  epigraf::CompositeArgs args{};
  i64 size, colours, samples, values;

  CompositeShape(const Check& check, Pointer t, Pointer values_, Pointer t_fine, Pointer values_fine, Pointer noise,
                 Pointer background, int dtype, i64 rays, i64 coarse, i64 fine, i64 channels, bool relu,
                 double softplus_beta, double density_shift, double last_interval, bool last_back,
                 bool white_background) {
    args.dtype = check.dtype(dtype);
    require(args.dtype == DType::f32 || args.dtype == DType::f64, check.op, "dtype must be that of fp32 or fp64");
    args.rays = check.size("rays", rays);
    args.coarse = check.side("coarse", coarse, 1);
    args.fine = check.side("fine", fine);
    args.channels = check.side("channels", channels, white_background ? 4 : 2);
    args.density = density_settings(check, relu, softplus_beta, density_shift, last_interval);
    args.last_back = last_back;
    args.white_background = white_background;
    size = epigraf::size_of(args.dtype);
    colours = check.product("colours", rays, channels - 1);
    samples = check.product("samples", rays, coarse + fine);
    values = check.product("values", samples, channels);
    args.t = check.pointer("t", t, size, rays * coarse);
    args.values = check.pointer("values", values_, size, rays * coarse * channels);
    args.t_fine = check.pointer("t_fine", t_fine, size, rays * fine);
    args.values_fine = check.pointer("values_fine", values_fine, size, rays * fine * channels);
    args.noise = check.pointer("noise", noise, size, samples, true);
    args.background = check.pointer("background", background, size, colours, true);
  }
};

epigraf::CompositeArgs composite_fwd(const Check& check, Pointer t, Pointer values, Pointer t_fine, Pointer values_fine,
                                     Pointer noise, Pointer background, Pointer rgb, Pointer depth, Pointer weight_sum,
                                     Pointer final_transmittance, Pointer weights, int dtype, i64 rays, i64 coarse,
                                     i64 fine, i64 channels, bool relu, double softplus_beta, double density_shift,
                                     double last_interval, bool last_back, bool white_background) {
  CompositeShape shape(check, t, values, t_fine, values_fine, noise, background, dtype, rays, coarse, fine, channels,
                       relu, softplus_beta, density_shift, last_interval, last_back, white_background);
  shape.args.rgb = check.pointer("rgb", rgb, shape.size, shape.colours);
  shape.args.depth = check.pointer("depth", depth, shape.size, rays);
  shape.args.weight_sum = check.pointer("weight_sum", weight_sum, shape.size, rays);
  shape.args.final_transmittance = check.pointer("final_transmittance", final_transmittance, shape.size, rays);
  shape.args.weights = check.pointer("weights", weights, shape.size, shape.samples, true);
  return shape.args;
}

epigraf::CompositeArgs composite_bwd(const Check& check, Pointer grad_rgb, Pointer grad_depth, Pointer grad_weight_sum,
                                     Pointer grad_transmittance, Pointer grad_weights, Pointer t, Pointer values,
                                     Pointer t_fine, Pointer values_fine, Pointer noise, Pointer background,
                                     Pointer grad_values, Pointer grad_noise, Pointer grad_background, int dtype,
                                     i64 rays, i64 coarse, i64 fine, i64 channels, bool relu, double softplus_beta,
                                     double density_shift, double last_interval, bool last_back,
                                     bool white_background) {
  CompositeShape shape(check, t, values, t_fine, values_fine, noise, background, dtype, rays, coarse, fine, channels,
                       relu, softplus_beta, density_shift, last_interval, last_back, white_background);
  shape.args.grad_rgb = check.pointer("grad_rgb", grad_rgb, shape.size, shape.colours, true);
  shape.args.grad_depth = check.pointer("grad_depth", grad_depth, shape.size, rays, true);
  shape.args.grad_weight_sum = check.pointer("grad_weight_sum", grad_weight_sum, shape.size, rays, true);
  shape.args.grad_transmittance = check.pointer("grad_transmittance", grad_transmittance, shape.size, rays, true);
  shape.args.grad_weights = check.pointer("grad_weights", grad_weights, shape.size, shape.samples, true);
  shape.args.grad_values = check.pointer("grad_values", grad_values, shape.size, shape.values);
  shape.args.grad_noise = check.pointer("grad_noise", grad_noise, shape.size, shape.samples, true);
  shape.args.grad_background = check.pointer("grad_background", grad_background, shape.size, shape.colours, true);
  return shape.args;
}

epigraf::SampleImportanceArgs sample_importance(const Check& check, Pointer t, Pointer raw, Pointer u, Pointer t_fine,
                                                int dtype, i64 rays, i64 samples, i64 fine, i64 stride, bool relu,
                                                double softplus_beta, double density_shift, bool sorted) {
  epigraf::SampleImportanceArgs args{};
  args.dtype = check.dtype(dtype);
  require(args.dtype == DType::f32 || args.dtype == DType::f64, check.op, "dtype must be that of fp32 or fp64");
  args.rays = check.size("rays", rays);
  args.samples = check.side("samples", samples, 3);
  args.fine = check.side("fine", fine);
  args.stride = check.side("stride", stride, 1);
  args.density = density_settings(check, relu, softplus_beta, density_shift, 0);  // the last weight is dropped
  args.sorted = sorted;
  const i64 size = epigraf::size_of(args.dtype), coarse = check.product("rays * samples", rays, samples);
  const i64 results = check.product("rays * fine", rays, fine);
  args.t = check.pointer("t", t, size, coarse);
  args.raw = check.pointer("raw", raw, size, check.product("rays * samples * stride", coarse, stride));
  args.u = check.pointer("u", u, size, results);
  args.t_fine = check.pointer("t_fine", t_fine, size, results);
  return args;
}

void bind_rays(py::module_& m) {
  EPIGRAF_DEFINE_CPU(m, composite_fwd);
  EPIGRAF_DEFINE_CPU(m, composite_bwd);
  EPIGRAF_DEFINE_CPU(m, sample_importance);
}

// ---- the build

const char* const kLevels[] = {"base", "v3", "v4"};

void bind_build(py::module_& m) {
#if defined(EPIGRAF_CUDA)
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    py::list levels;
    for (int level = 0; level < 3; level++)
      if (epigraf::is_built(static_cast<epigraf::CpuLevel>(level))) levels.append(kLevels[level]);
    info["cpu_levels"] = levels;
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#if defined(EPIGRAF_CUDA)
    info["cuda"] = EPIGRAF_CUDA;
    info["cuda_archs"] = EPIGRAF_CUDA_ARCHS;
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = py::none();
#endif
    return info;
  });
  m.def("cpu_level", [] { return kLevels[static_cast<int>(epigraf::cpu_level())]; });
  m.def("processor_level", [] { return kLevels[static_cast<int>(epigraf::processor_level())]; });
  m.def("set_cpu_level", [](const std::string& name) {
    for (int level = 0; level < 3; level++)
      if (name == kLevels[level] && epigraf::has_cpu_level(static_cast<epigraf::CpuLevel>(level)))
        return epigraf::set_cpu_level(static_cast<epigraf::CpuLevel>(level));
    throw py::value_error("set_cpu_level: this processor or build has no level '" + name + "'");
  });
}

#if defined(EPIGRAF_DRIVER)
// Without the GIL, as all that may wait for a compilation, which needs it.
void bind_driver(py::module_& m) {
  // Called with a kernel's name by the first launch of it on a GPU; gives its machine code.
  m.def("set_cuda_compiler", [](py::function compile) {
    auto* kept = new py::function(std::move(compile));  // stays: Python has ended when static objects are destroyed
    py::gil_scoped_release release;
    epigraf::driver::set_compiler([kept](const std::string& name) -> std::string {
      py::gil_scoped_acquire acquire;
      try {
        return py::cast<std::string>(py::bytes((*kept)(name)));
      } catch (py::error_already_set& error) {  // must not outlive the GIL
        throw std::runtime_error(py::cast<std::string>(py::str(error.value())));
      }
    });
  });
  m.def("use_cuda_device", [](int index) {
    py::gil_scoped_release release;
    epigraf::driver::use_device(index);
  });
  m.def("open_cuda_driver", [](const std::string& path) {
    py::gil_scoped_release release;
    epigraf::driver::open(path.c_str());
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_build(m);
#if defined(EPIGRAF_DRIVER)
  bind_driver(m);
#endif
  bind_bias_act(m);
  bind_upfirdn2d(m);
  bind_layer_epilogue(m);
  bind_modulation(m);
  bind_decode_triplane(m);
  bind_rays(m);
}
