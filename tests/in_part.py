"""Settings, beside those of `tiny_config`, of a run whose planes are computed in part (docs/region.md)."""

from __future__ import annotations

from typing import Any

# Planes of the least size that it pays for, and a lens and patches that see a part of the cube.
IN_PART: dict[str, Any] = {
    "micro_batch": 4,
    "generator": {"plane_resolution": 128},
    "camera": {"fov": 8.0, "radius": 1.0, "ray_start": 0.88, "ray_end": 1.12, "cube_scale": 0.2},
    "patch": {"resolution": 8, "beta_start": 1.5, "beta_end": 2.0},
}
