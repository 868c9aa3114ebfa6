"""The specification: each op in plain torch, clean in float64 and differentiable to any order.

Everything here is written to be read beside the equations, and is the truth that every other backend is tested against.
Nothing here imports anything of ours but its siblings. Shapes: see the legend in `epigraf_fast/ops/__init__.py`.
"""
