"""Surfaces of generated objects: density volume, marching cubes, vertex colours.

$ epigraf mesh runs/demo --out object.ply object.glb volume.mrc --seeds 3
$ epigraf mesh runs/ffhq --out head.obj --seeds 0-3 --resolution 512 --threshold 25 --largest
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor

from ..camera import cam2world_matrix, camera_rays, frustum_extent
from ..errors import UserError
from ..models.generator import Generator
from ..progress import Progress, waiting
from ..training.pretrained import load_generator
from ..training.sampling import circle_angles, showing_pose, surface_depth, turntable_angles
from .arguments import NUMBERS, PATHS, GeneratorOptions, Json, Overwrite, default, real, whole
from .command import check_output, output, require
from .render import OPAQUE, Scene, check_generator_arguments, save_picture

MESHES = (".ply", ".obj", ".glb", ".png")
MARCHING_CUBES = "skimage.measure", "scikit-image", "tools"  # module, package, extra
TRIMESH = "trimesh", "trimesh", "tools"
MRCFILE = "mrcfile", "mrcfile", "tools"
CHUNK = 2**17  # points that are decoded at once
SLAB = 32  # layers of the volume that marching cubes sees at once
VIEWS, VIEW_SIZE = 6, 32  # what the automatic threshold looks at
PROGRESS = Callable[[Any, str], Any]  # shows how far a loop over items of that name has got


def no_progress(items: Any, unit: str) -> Any:
    return items


def _decode(generator: Generator, planes: Tensor, points: Tensor) -> Tensor:
    """Points [N, 3] in world units -> [N, 4], raw colours and raw density."""
    planes = planes[:, : generator.plane_channels]
    return generator.decoder.at_points(planes, points[None], generator.camera.cube_scale)[0]


@torch.no_grad()
def density_volume(
    generator: Generator, planes: Tensor, resolution: int, progress: PROGRESS = no_progress
) -> np.ndarray:
    """Raw densities at the points of a grid that spans the cube, corners included, computed in chunks.

    What lies farther from the origin than any ray reaches has never been trained on, and gets the lowest density found.

    Args:
        planes: [1, 3*C and what a background takes, H, W].

    Returns:
        [x, y, z] float32, `resolution` each.

    Raises:
        UserError: No point of so coarse a grid is within reach.
    """
    camera = generator.camera
    axis = torch.linspace(-camera.cube_scale, camera.cube_scale, resolution, device=planes.device)
    total = resolution**3
    volume = np.empty(total, np.float32)
    for first in progress(range(0, total, CHUNK), "points"):
        index = torch.arange(first, min(first + CHUNK, total), device=planes.device)
        points = axis[torch.stack([index // resolution**2, index // resolution % resolution, index % resolution], 1)]
        volume[first : first + CHUNK] = _decode(generator, planes, points)[:, 3].float().cpu().numpy()
    volume = volume.reshape(resolution, resolution, resolution)
    squares = axis.cpu().numpy().astype(np.float64) ** 2
    reach = frustum_extent(camera.fov, camera.radius, camera.ray_start, camera.ray_end)
    plane = squares[:, None] + squares
    outside = [x + plane > reach**2 for x in squares]
    inside = [float(values[~out].min()) for values, out in zip(volume, outside, strict=True) if not out.all()]
    if not inside:
        raise UserError(f"none of {resolution} points a side is within reach of the rays: raise --resolution")
    for values, out in zip(volume, outside, strict=True):
        values[out] = min(inside)
    return volume


@torch.no_grad()
def automatic_threshold(
    generator: Generator, planes: Tensor, whole_sphere: bool, progress: PROGRESS = no_progress
) -> float:
    """The median raw density where a few views see the surface: the level whose surface lies at the rendered depth.

    Raises:
        UserError: No ray is opaque.
    """
    camera = generator.camera
    if whole_sphere:
        angles = turntable_angles(VIEWS)
    else:
        angles = circle_angles(VIEWS, generator.mean_camera_pose, 0.3, 0.15)
    found = []
    for pose in progress(angles.to(planes.device), "views"):
        images = generator.render(planes, pose[None], VIEW_SIZE, layer="foreground", stochastic=False)
        origins, directions = camera_rays(cam2world_matrix(pose[None], camera.radius), camera.fov, VIEW_SIZE)
        opaque = images.weight_sum.flatten() > OPAQUE
        points = origins + surface_depth(images, camera.ray_end).flatten(1)[..., None] * directions
        found.append(_decode(generator, planes, points[0, opaque])[:, 3])
    densities = torch.cat(found)
    if not len(densities):
        raise UserError("no ray of this object is opaque, so there is no surface to find: give a --threshold")
    return float(densities.median())


@dataclass(frozen=True)
class Surface:
    """A triangle mesh in world units."""

    vertices: np.ndarray  # [V, 3] float32
    faces: np.ndarray  # [F, 3] int, counter-clockwise from outside
    colors: np.ndarray  # [V, 3] uint8


@torch.no_grad()
def extract(
    generator: Generator, planes: Tensor, volume: np.ndarray, threshold: float, progress: PROGRESS = no_progress
) -> Surface:
    """The surface of a density level, closed where it meets the cube.

    Raises:
        UserError: The level is above or below all densities.
    """
    low, high = float(volume.min()), float(volume.max())
    if not low < threshold < high:
        raise UserError(f"--threshold must be between the densities {low:.4g} and {high:.4g}, got {threshold:.4g}")
    spacing = 2 * generator.camera.cube_scale / (len(volume) - 1)
    vertices, faces = level_set(np.pad(volume, 1, constant_values=low), threshold, progress)
    vertices = ((vertices - 1) * spacing - generator.camera.cube_scale).astype(np.float32)
    points = torch.from_numpy(vertices).to(planes.device).split(CHUNK)
    raw = torch.cat([_decode(generator, planes, part)[:, :3] for part in progress(points, "colours")])
    colors = ((raw.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return Surface(vertices, faces[:, ::-1].astype(np.int64), colors)  # outwards


def level_set(volume: np.ndarray, level: float, progress: PROGRESS = no_progress) -> tuple[np.ndarray, np.ndarray]:
    """Marching cubes, slab by slab: a call for the whole of a large volume would hear nothing for minutes.

    Slabs share a layer of points, and the vertices on it are those of both, which become one.

    Returns:
        Vertices [V, 3] in steps of the grid and faces [F, 3].
    """
    measure = require(*MARCHING_CUBES)
    vertices, faces, count = [np.zeros((0, 3), np.float32)], [np.zeros((0, 3), np.int64)], 0
    for first in progress(range(0, len(volume) - 1, SLAB), "slabs"):
        slab = volume[first : first + SLAB + 1]
        if not slab.min() < level < slab.max():
            continue
        found, corners, _, _ = measure.marching_cubes(slab, level)
        vertices.append(found + np.array([first, 0, 0], np.float32))
        faces.append(corners + count)
        count += len(found)
    points, triangles = np.concatenate(vertices), np.concatenate(faces)
    shared = np.nonzero(points[:, 0] % SLAB == 0)[0]
    _, firsts, which = np.unique(points[shared], axis=0, return_index=True, return_inverse=True)
    same = np.arange(len(points))
    same[shared] = shared[firsts[which.reshape(-1)]]
    triangles = same[triangles]
    a, b, c = triangles.T
    triangles = triangles[(a != b) & (b != c) & (c != a)]
    used = np.zeros(len(points), bool)
    used[triangles] = True
    return points[used], (np.cumsum(used) - 1)[triangles]


def components(surface: Surface) -> np.ndarray:
    """The connected component of each face [F], 0 the largest."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = len(surface.vertices)
    ends = np.concatenate([surface.faces[:, [0, 1]], surface.faces[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(ends), bool), ends.T), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, of_face, counts = np.unique(labels[surface.faces[:, 0]], return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return rank[of_face]


def largest(surface: Surface) -> Surface:
    """The component with the most faces alone."""
    faces = surface.faces[components(surface) == 0]
    used, faces = np.unique(faces, return_inverse=True)
    return Surface(surface.vertices[used], faces.reshape(-1, 3), surface.colors[used])


def to_trimesh(surface: Surface) -> Any:
    """A trimesh.Trimesh with vertex colours."""
    trimesh = require(*TRIMESH)
    return trimesh.Trimesh(surface.vertices, surface.faces, vertex_colors=surface.colors, process=False)


def measured(surface: Surface) -> dict[str, Any]:
    """What there is to know about a mesh; lengths in world units."""
    mesh = to_trimesh(surface)
    sizes = np.bincount(components(surface))
    return {
        "vertices": len(surface.vertices),
        "faces": len(surface.faces),
        "watertight": bool(mesh.is_watertight),
        "consistent_winding": bool(mesh.is_winding_consistent),
        "components": len(sizes),
        "largest_component": float(sizes[0] / sizes.sum()),  # share of the faces
        "box": np.ptp(surface.vertices, axis=0).tolist(),
        "area": float(mesh.area),
        "volume": float(mesh.volume),
    }


def statistics(found: dict[str, Any]) -> Iterator[str]:
    """What `measured` found, line by line."""
    yes = {True: "yes", False: "no"}
    yield f"{found['vertices']:,} vertices, {found['faces']:,} faces"
    yield f"watertight: {yes[found['watertight']]}, consistent winding: {yes[found['consistent_winding']]}"
    yield f"components: {found['components']}, the largest {found['largest_component']:.1%} of the faces"
    sides = " x ".join(f"{side:.4g}" for side in found["box"])
    yield f"box: {sides}, area {found['area']:.4g}, volume {found['volume']:.4g} (world units)"


def save_mesh(surface: Surface, path: Path) -> None:
    """Writes a .ply, .obj or .glb, whole or not at all."""
    with waiting(f"writing {path.name}"), output(path) as partial:
        if path.suffix == ".glb":
            partial.write_bytes(glb_of(surface))
        else:
            to_trimesh(surface).export(partial)


def linear(colors: np.ndarray) -> np.ndarray:
    """8-bit sRGB values as light, from 0 to 1."""
    share = np.arange(256) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)[colors]


def glb_of(surface: Surface) -> bytes:
    """The file of a mesh in binary glTF 2.0: smooth normals, vertex colours as light, unlit.

    The colours are what rays have gathered, light and shadow in them, so nothing is to light them once more. A program
    that knows no unlit material finds a rough one that is no metal. (What libraries write by default has neither
    normals nor a material, which makes it faceted metal.)
    """
    arrays = {  # name -> what it is of, its numbers, their type in glTF
        "POSITION": ("VEC3", surface.vertices.astype("<f4"), 5126),
        "NORMAL": ("VEC3", to_trimesh(surface).vertex_normals.astype("<f4"), 5126),
        "COLOR_0": ("VEC3", linear(surface.colors).astype("<f4"), 5126),
        "indices": ("SCALAR", surface.faces.astype("<u4").reshape(-1), 5125),
    }
    accessors, views, content = [], [], b""
    for name, (kind, array, component) in arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        views.append({"buffer": 0, "byteOffset": len(content), "byteLength": len(data)})
        accessor = {"bufferView": len(accessors), "componentType": component, "count": len(array), "type": kind}
        if name == "POSITION":  # where the format asks for them
            accessor |= {"min": array.min(axis=0).tolist(), "max": array.max(axis=0).tolist()}
        accessors.append(accessor)
        content += data
    places = {name: number for number, name in enumerate(arrays)}
    primitive = {"indices": places.pop("indices"), "attributes": places, "material": 0}
    rough = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    scene = {
        "asset": {"version": "2.0", "generator": "epigraf_fast"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "extensionsUsed": ["KHR_materials_unlit"],
        "materials": [{"pbrMetallicRoughness": rough, "doubleSided": True, "extensions": {"KHR_materials_unlit": {}}}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(content)}],
    }
    text = json.dumps(scene, separators=(",", ":")).encode()
    chunks = ((b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", content))  # all arrays are of four-byte numbers
    body = b"".join(struct.pack("<I", len(data)) + kind + data for kind, data in chunks)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def picture(surface: Surface, generator: Generator, size: int = 512, progress: PROGRESS = no_progress) -> np.ndarray:
    """The mesh from `showing_pose`, in its colours and beside that as clay: uint8 [size, 2 size, 3].

    Faces are painted from far to near, at twice the size, brighter the more they face the camera.
    """
    camera = generator.camera
    cam2world = cam2world_matrix(showing_pose(generator)[None], camera.radius)[0].double().numpy()
    local = (surface.vertices - cam2world[:3, 3]) @ cam2world[:3, :3]  # right, up, backward
    place = local[:, :2] / (-local[:, 2:] * math.tan(math.radians(camera.fov) / 2)) * (1, -1)
    corners, pixels = local[surface.faces], ((place + 1) * size)[surface.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    towards = -corners.mean(axis=1)
    facing = (normals * towards).sum(axis=1) / np.linalg.norm(towards, axis=1)
    order = np.argsort(corners[:, :, 2].mean(axis=1))
    order = order[facing[order] > 0]
    light = 0.35 + 0.65 * facing[:, None]
    halves = []
    for colors in (surface.colors[surface.faces].mean(axis=1) * (0.5 + 0.5 * light), 225 * light * np.ones(3)):
        image = PIL.Image.new("RGB", (2 * size, 2 * size), "white")
        draw = PIL.ImageDraw.Draw(image)
        for face in progress(order, "faces"):
            draw.polygon(list(map(tuple, pixels[face])), fill=tuple(colors[face].astype(int)))
        halves.append(np.asarray(image.resize((size, size), PIL.Image.Resampling.BOX)))
    return np.concatenate(halves, axis=1)


def save_mrc(volume: np.ndarray, voxel: float, path: Path) -> None:
    """Writes a volume [x, y, z] as an MRC file, which stores z slowest; whole or not at all."""
    with (
        waiting(f"writing {path.name}"),
        output(path) as partial,
        require(*MRCFILE).new(partial, overwrite=True) as file,
    ):
        file.set_data(np.ascontiguousarray(volume.transpose(2, 1, 0)))
        file.voxel_size = voxel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GeneratorOptions):
    """The command line of `epigraf mesh`."""

    seeds: Annotated[tuple[int, ...], NUMBERS] = (0,)
    """Objects, as in 0-15 or 1,4,7-9; of several each gets files of its own, as in x-3.ply."""
    out: Annotated[tuple[Path, ...], PATHS]
    """Files to write, of .ply .obj .glb (meshes), .mrc (the density volume) and .png (a picture)."""
    overwrite: Overwrite = False
    resolution: Annotated[int, whole(8, 1024)] = 256
    """Points along each side of the volume."""
    threshold: Annotated[float | None, real(), default("what the rendered depth says")] = None
    """The raw density at which the surface lies."""
    largest: bool = False
    """Drop all but the largest component."""
    json: Json = False


def run(options: Options) -> None:
    files = {
        seed: [p if len(options.seeds) == 1 else p.with_name(f"{p.stem}-{seed}{p.suffix}") for p in options.out]
        for seed in options.seeds
    }
    every = [path for paths in files.values() for path in paths]
    if len(files) < len(options.seeds) or len(set(every)) < len(every):
        raise UserError("--seeds and --out must differ among themselves, as the files are named after them")
    for path in every:
        check_output("--out", path, (*MESHES, ".mrc"), overwrite=options.overwrite)
    for path in options.out:
        for package in (MRCFILE,) if path.suffix == ".mrc" else (MARCHING_CUBES, TRIMESH):
            require(*package)
    with waiting("reading the checkpoint"):
        config, generator = load_generator(options.checkpoint, options.device)
    check_generator_arguments(options, generator)
    scene = Scene(generator, config.resolution, truncation=options.truncation, cutoff=options.cutoff)
    results = []
    for (seed, paths), ws in zip(files.items(), scene.ws(options.seeds, options.labels or ()), strict=True):
        with waiting("painting the planes"):
            planes = scene.paint(ws).planes
        volume = density_volume(generator, planes, options.resolution, Progress)
        threshold, how = options.threshold, "given"
        if threshold is None:
            whole_sphere = config.camera.prior == "spherical_uniform"
            threshold, how = automatic_threshold(generator, planes, whole_sphere, Progress), "found"
        low, high = float(volume.min()), float(volume.max())
        result = {"seed": seed, "density_min": low, "density_max": high, "threshold": threshold}
        lines = [f"seed {seed}: densities {low:.4g} to {high:.4g}, threshold {threshold:.4g} ({how})"]
        surface = None
        for path in paths:
            if path.suffix == ".mrc":
                save_mrc(volume, 2 * config.camera.cube_scale / (options.resolution - 1), path)
                continue
            if surface is None:
                surface = extract(generator, planes, volume, threshold, Progress)
                with waiting("measuring the mesh"):
                    surface = largest(surface) if options.largest else surface
                    result |= measured(surface)
                lines += [f"  {line}" for line in statistics(result)]
            if path.suffix == ".png":
                save_picture(picture(surface, generator, progress=Progress), path)
            else:
                save_mesh(surface, path)
        results.append(result | {"files": list(map(str, paths))})
        if not options.json:
            print(*lines, *(f"  wrote {path}" for path in paths), sep="\n", flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
