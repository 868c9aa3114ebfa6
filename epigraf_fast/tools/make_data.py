"""Renders meshes into a data set: a zip of PNG images with known cameras in its dataset.json.

$ epigraf data make --recipe builtin --scale 4 --out objects64.zip
$ epigraf data make --recipe megascans --meshes FOLDER --resolution 256 --out plants.zip

`builtin` renders objects that the package pybullet carries (the set in epigraf_fast/builtin/), `megascans` a folder of
.obj, .ply, .stl, .glb or .gltf files the way the paper's Megascans sets were made; its subfolders become classes. The
cameras are uniform on the sphere and look at the centre of the object's box. Lights stand still in the world, so that
shading belongs to the object. The background is white. A seed fixes objects and cameras.

Needs `pip install -e '.[make_dataset]'`. Without a display VTK renders through the system's EGL or OSMesa
library; Mesa's software driver will do (a bare Debian gets it from `apt install libegl1`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import random
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import PIL.Image
import torch

from ..camera import cam2world_matrix, sample_angles
from ..errors import UserError, not_installed
from ..files import READ_ERRORS, reason, walk
from ..progress import Progress, waiting
from .arguments import Overwrite, check_effect, default, optional, real, whole
from .command import check_output, heard, output, uninterrupted
from .poses import border_fov

MESH_SUFFIXES = (".obj", ".ply", ".stl", ".glb", ".gltf")
SUPERSAMPLING = 4
AMBIENT = 0.4
GREY = (0.7, 0.7, 0.7)  # of meshes without colours
PYBULLET_ATTRIBUTION = (
    "Renderings of pybullet_data/random_urdfs from pybullet 3.2.7 (Bullet Physics SDK, Erwin Coumans and contributors, "
    "http://bulletphysics.org), zlib licence."
)
LIGHTS = (((0.5, 0.9, 0.6), 0.62), ((-0.9, -0.1, 0.3), 0.36), ((0.2, -0.6, -0.9), 0.26))  # (towards the light, power)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a kind of objects is put before the camera. Lengths in world units, `fov` in degrees."""

    fov: float
    radius: float
    ray_start: float
    ray_end: float
    cube_scale: float
    views: int
    min_alpha: float  # objects that cover less of the image, on average over the views, are dropped
    sphere_radius: float | None = None  # scale to this bounding sphere...
    box_side: float | None = None  # ... or to this longest side of the box
    min_box_volume: float = 0.0  # objects whose box has less, before `scaled`, are dropped
    unit: float = 1.0  # what `scaled` has multiplied lengths by

    def scaled(self, factor: float) -> Recipe:
        """The same pictures in other units: every length times `factor`."""
        lengths = ("radius", "ray_start", "ray_end", "cube_scale", "sphere_radius", "box_side", "unit")
        scaled = {key: getattr(self, key) and getattr(self, key) * factor for key in lengths}
        return dataclasses.replace(self, **scaled)

    def camera(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in ("fov", "radius", "ray_start", "ray_end", "cube_scale")}


RECIPES = {
    # Megascans-like geometry in units 8 times larger: distances of order one between the samples of a ray make
    # densities learnable fast. The sphere is 5% smaller than the largest in view, 8 sin(15 degrees).
    "builtin": Recipe(
        fov=30, radius=8, ray_start=6, ray_end=10, cube_scale=3.8, views=10, min_alpha=0.17, sphere_radius=1.95
    ),
    # The paper's rendering. The rays cover the sphere that is in view, of radius 3.5 sin(22.5 degrees) = 1.339.
    "megascans": Recipe(
        fov=45,
        radius=3.5,
        ray_start=2.1,
        ray_end=4.9,
        cube_scale=2.6,
        views=128,
        min_alpha=0.03,
        box_side=2,
        min_box_volume=2,
    ),
}


class Dropped(Exception):
    """Why an object does not come into the set."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    name: str
    path: Path
    color: tuple[float, float, float] | None = None  # None: the file's own materials
    label: int | None = None


def downsample(image: np.ndarray, factor: int) -> np.ndarray:
    """Box filter: [H * factor, W * factor, C] uint8 to [H, W, C] uint8."""
    height, width, channels = image.shape
    blocks = image.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def bounds(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Centre of the box [3], its sides [3] and the radius of the sphere around that centre, of points [N, 3]."""
    low, high = points.min(axis=0), points.max(axis=0)
    centre = (low + high) / 2
    return centre, high - low, float(np.linalg.norm(points - centre, axis=1).max())


def scale_for(recipe: Recipe, sides: np.ndarray, sphere_radius: float) -> float:
    """The factor from file units to world units."""
    return recipe.sphere_radius / sphere_radius if recipe.sphere_radius else recipe.box_side / float(sides.max())


def pybullet_meshes(seed: int) -> Iterator[Mesh]:
    """The 1000 random objects of pybullet in a random order, but those too dark or too pale to show on white."""
    # Found without importing pybullet_data: only its files are needed.
    spec = importlib.util.find_spec("pybullet_data")
    if spec is None:
        raise UserError("pybullet, which has these objects, is not installed: pip install pybullet")
    folders = sorted((Path(spec.origin).parent / "random_urdfs").iterdir())
    random.Random(seed).shuffle(folders)
    for folder in folders:
        urdf = (folder / f"{folder.name}.urdf").read_text()
        color = tuple(map(float, re.search(r'<color rgba="([^"]+)"', urdf)[1].split()[:3]))
        luminance = float(np.dot(color, (0.299, 0.587, 0.114)))
        if max(color) >= 0.55 and luminance <= 0.8:
            yield Mesh(folder.name, folder / f"{folder.name}.obj", color)


def folder_meshes(folder: Path) -> tuple[list[Mesh], list[str]]:
    """The meshes under a folder and, if they lie in subfolders, the class names (the first level of folders)."""
    if not folder.is_dir():
        raise UserError(f"--meshes {folder} is not a folder: give a folder of {', '.join(MESH_SUFFIXES)} files")
    try:
        paths = sorted(path for path in walk(folder) if path.suffix.lower() in MESH_SUFFIXES)
    except READ_ERRORS as error:
        raise UserError(f"--meshes {folder} cannot be listed ({reason(error)}): allow reading all of it") from None
    if not paths:
        raise UserError(f"--meshes {folder} has no {', '.join(MESH_SUFFIXES)} file: give a folder of meshes")
    relative = [path.relative_to(folder) for path in paths]
    nested = [len(path.parts) > 1 for path in relative]
    if any(nested) and not all(nested):
        stray = relative[nested.index(False)]
        raise UserError(f"--meshes {folder}: {stray} is in no class folder but others are: move it into one")
    classes = sorted({path.parts[0] for path in relative}) if all(nested) else []
    label = {name: index for index, name in enumerate(classes)}
    names = [path.with_suffix("").as_posix() for path in relative]
    return [Mesh(n, p, label=label.get(r.parts[0])) for n, p, r in zip(names, paths, relative, strict=True)], classes


def material_file(path: Path) -> Path | None:
    """The .mtl that an .obj names; None if there is none, or for another kind of file."""
    if path.suffix.lower() == ".obj":
        with path.open(errors="replace") as lines:
            names = (line.split(maxsplit=1)[1].strip() for line in lines if line.startswith("mtllib "))
            return next((path.parent / name for name in names if (path.parent / name).is_file()), None)
    return None


class Renderer:
    """An off-screen VTK window with a white background and lights fixed in the world."""

    def __init__(self, recipe: Recipe, resolution: int) -> None:
        try:
            import pyvista
            from vtkmodules.vtkCommonCore import vtkLogger
        except ImportError as error:
            raise not_installed(error.name, "make_dataset") from None
        vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_ERROR)  # else it warns that there is no X server
        self.pyvista, self.recipe = pyvista, recipe
        size = resolution * SUPERSAMPLING
        self.plotter = pyvista.Plotter(off_screen=True, window_size=(size, size), lighting="none")
        self.plotter.set_background("white")
        self.plotter.render_window.SetMultiSamples(0)
        self.plotter.camera.view_angle = border_fov(recipe.fov, resolution)  # VTK's goes from border to border

    def render(self, mesh: Mesh, angles: torch.Tensor) -> tuple[list[np.ndarray], float]:
        """V views of a mesh, [R, R, 3] uint8, and their mean alpha.

        Args:
            angles: [V, 3] yaw, pitch, roll.

        Raises:
            Dropped: The mesh cannot be read, has no extent, or its box is below `min_box_volume`.
        """
        recipe, plotter = self.recipe, self.plotter
        try:
            points = self._load(mesh)
        except READ_ERRORS as error:
            raise Dropped(f"it cannot be read ({reason(error)})") from None
        if not len(points):
            raise Dropped("it has no surface that can be read")
        if not (np.isfinite(points).all() and np.ptp(points, axis=0).any()):
            raise Dropped("it has no extent, or one that is not finite")
        centre, sides, sphere_radius = bounds(points)
        scale = scale_for(recipe, sides, sphere_radius)
        volume = float(np.prod(sides * scale / recipe.unit))
        if volume < recipe.min_box_volume:
            raise Dropped(f"its box has a volume of {volume:.3g}, --min-box-volume is {recipe.min_box_volume:g}")

        # The camera goes into the file's units rather than the object into the world's; the lights are directional.
        depth = recipe.radius / scale
        near, far = depth - 1.01 * sphere_radius, depth + 1.01 * sphere_radius
        images, alphas = [], []
        for cam2world in cam2world_matrix(angles.double(), recipe.radius).numpy():  # [4, 4]
            plotter.camera.position = centre + cam2world[:3, 3] / scale
            plotter.camera.focal_point = centre
            plotter.camera.up = cam2world[:3, 1]
            plotter.camera.clipping_range = max(near, 1e-3 * depth), far
            plotter.render()
            rgba = plotter.screenshot(transparent_background=True, return_img=True)  # its colours lie over white
            images.append(downsample(rgba[..., :3], SUPERSAMPLING))
            alphas.append(rgba[..., 3].mean() / 255)
        return images, float(np.mean(alphas))

    def _load(self, mesh: Mesh) -> np.ndarray:
        """Makes the mesh the scene's only object, with diffuse materials. Returns its points [N, 3]."""
        plotter, path = self.plotter, mesh.path
        plotter.clear_actors()
        plotter.renderer.RemoveAllViewProps()  # actors of the importers below
        materials = material_file(path) if mesh.color is None else None
        if path.suffix.lower() in (".glb", ".gltf"):
            plotter.import_gltf(path, set_camera=False)
        elif materials is not None:
            plotter.import_obj(path, materials)
        else:
            surface = self.pyvista.read(path)
            if surface.GetNumberOfPolys():
                surface = surface.compute_normals(cell_normals=False, split_vertices=True, feature_angle=30)
                colors = next((name for name in ("RGB", "RGBA") if name in surface.point_data), None)
                plotter.add_mesh(
                    surface, color=mesh.color or GREY, scalars=colors, rgb=bool(colors), smooth_shading=True
                )
        plotter.renderer.remove_all_lights()  # lights of the importers
        for direction, power in LIGHTS:
            plotter.add_light(self.pyvista.Light(position=direction, intensity=power, light_type="scene light"))

        actors = plotter.renderer.GetActors()
        points = [np.zeros((0, 3))]
        for actor in (actors.GetItemAsObject(index) for index in range(actors.GetNumberOfItems())):
            material = actor.GetProperty()
            texture = material.GetTexture("albedoTex")  # of a glTF material, which reflects unless made a plain one
            if texture is not None:
                texture.UseSRGBColorSpaceOff()
                material.RemoveAllTextures()
                actor.SetTexture(texture)
            if actor.GetTexture() is not None:
                actor.ForceOpaqueOn()  # leaves are cards with holes: as translucent ones they would show in any order
            material.SetInterpolationToPhong()
            material.SetAmbientColor(material.GetDiffuseColor())
            material.SetAmbient(AMBIENT)
            material.SetDiffuse(1)
            material.SetSpecular(0)
            actor.GetMapper().Update()
            vertices = np.asarray(self.pyvista.wrap(actor.GetMapper().GetInput()).points, dtype=np.float64)
            to_scene = self.pyvista.array_from_vtkmatrix(actor.GetMatrix())
            points.append(vertices @ to_scene[:3, :3].T + to_scene[:3, 3])
        return np.concatenate(points)


def png_of(image: np.ndarray) -> bytes:
    """The file of a uint8 [H, W, 3] image."""
    png = io.BytesIO()
    PIL.Image.fromarray(image).save(png, "png", optimize=True)
    return png.getvalue()


def render_dataset(
    meshes: Iterable[Mesh],
    out: Path,
    recipe: Recipe,
    *,
    resolution: int,
    seed: int = 0,
    limit: int | None = None,
    classes: Sequence[str] = (),
    attribution: str = "",
) -> tuple[int, int]:
    """Writes the zip: object/view.png, both counted from 0, and dataset.json.

    Args:
        limit: Stop after this many objects.

    Returns:
        How many objects were kept and how many dropped.

    Raises:
        KeyboardInterrupt: After the objects that there are by then were written.
    """
    with waiting("starting VTK"):
        renderer = Renderer(recipe, resolution)
    generator = torch.Generator().manual_seed(seed)
    objects, labels, camera_angles, dropped = [], [], {}, 0
    interrupt = None
    with output(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        try:
            for mesh in Progress(meshes, "objects", limit):
                if len(objects) == limit:
                    break
                draws = torch.rand(recipe.views, 2, generator=generator)
                angles = sample_angles(recipe.views, "spherical_uniform", draws=draws)
                try:
                    views, alpha = renderer.render(mesh, angles)
                    if alpha < recipe.min_alpha:
                        raise Dropped(f"it covers {alpha:.3f} of its images, --min-alpha is {recipe.min_alpha:g}")
                except Dropped as why:
                    Progress.say(f"dropped {mesh.path}: {why}")
                    dropped += 1
                    continue
                pngs = [png_of(image) for image in views]
                with uninterrupted():  # an object is in the set with all its views
                    for view, png in enumerate(pngs):
                        name = f"{len(objects):04d}/{view:03d}.png"
                        archive.writestr(zipfile.ZipInfo(name), png)  # undated: equal runs, equal files
                        camera_angles[name] = [round(angle, 6) for angle in angles[view].tolist()]
                        labels.append([name, mesh.label])
                    objects.append(mesh.name)
        except KeyboardInterrupt as error:
            interrupt = error
            heard()
        if interrupt is not None and not objects:
            raise interrupt
        if not objects:
            raise UserError(
                f"all {dropped} meshes were dropped, each as said above: lower the flag that is named there"
            )
        present = sorted({label for _, label in labels}) if classes else []
        number = {label: place for place, label in enumerate(present)}
        for label in set(range(len(classes))) - set(present):
            Progress.say(f"class {classes[label]} has lost all its objects, and is none of the set's classes")
        metadata = {
            "attribution": attribution,
            "camera": recipe.camera(),
            "objects": objects,
            "classes": [classes[label] for label in present],
            "labels": [[name, number[label]] for name, label in labels] if classes else None,
            "camera_angles": camera_angles,
        }
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(metadata), zipfile.ZIP_DEFLATED)
    if interrupt is not None:
        print(f"{out}: the {len(objects)} objects that were rendered until the interruption", flush=True)
        raise interrupt
    return len(objects), dropped


FOR_RECIPES = {"meshes": ("megascans",), "attribution": ("megascans",)}
BUILTIN_OBJECTS = 400


def _of_recipes(name: str) -> str:
    return ", ".join(f"{recipe}: {getattr(RECIPES[recipe], name):g}" for recipe in RECIPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of `epigraf data make`."""

    recipe: Literal[tuple(RECIPES)]
    """What to render, and how."""
    out: Path
    """The .zip to write."""
    overwrite: Overwrite = False
    meshes: Annotated[Path | None, optional] = None
    """For megascans: the folder of meshes; its subfolders become classes."""
    resolution: Annotated[int, whole(4, 4096)] = 64
    """Pixels a side of the images, a power of two."""
    objects: Annotated[int | None, whole(1, 10_000_000), default(f"builtin: {BUILTIN_OBJECTS}, megascans: all")] = None
    """How many objects at most."""
    views: Annotated[int | None, whole(1, 1000), default(_of_recipes("views"))] = None
    """Images of each object."""
    min_alpha: Annotated[float | None, real(0, 1), default(_of_recipes("min_alpha"))] = None
    """Drop objects that cover less than this share of their images."""
    min_box_volume: Annotated[float | None, real(0, 1e6), default(_of_recipes("min_box_volume"))] = None
    """Drop objects whose box has less volume, for megascans once its longest side is scaled to 2; 0 drops none."""
    attribution: Annotated[str | None, optional] = None
    """For megascans: source and licence of the meshes, for dataset.json."""
    scale: Annotated[float, real(1e-6, 1e6)] = 1.0
    """Factor on every length: the units of the scene, not the pictures."""
    seed: Annotated[int, whole(0, 2**63 - 1)] = 0
    """Which objects and cameras are drawn."""


def run(options: Options) -> None:
    check_effect(options, options.recipe, FOR_RECIPES)
    check_output("--out", options.out, (".zip",), overwrite=options.overwrite)
    overrides = {name: getattr(options, name) for name in ("views", "min_alpha", "min_box_volume")}
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = dataclasses.replace(RECIPES[options.recipe], **given).scaled(options.scale)
    if options.resolution & (options.resolution - 1):
        raise UserError(f"--resolution must be a power of two, at least 4, got {options.resolution}")
    if options.recipe == "builtin":
        meshes, classes = pybullet_meshes(options.seed), []
        limit, attribution = options.objects or BUILTIN_OBJECTS, PYBULLET_ATTRIBUTION
    else:
        if options.meshes is None:
            raise UserError("--recipe megascans needs --meshes FOLDER")
        meshes, classes = folder_meshes(options.meshes)
        if options.out.exists() and any(mesh.path.samefile(options.out) for mesh in meshes):
            raise UserError(f"--out {options.out} is one of the meshes: choose another output")
        limit, attribution = options.objects, options.attribution or ""
    kept, dropped = render_dataset(
        meshes,
        options.out,
        recipe,
        resolution=options.resolution,
        seed=options.seed,
        limit=limit,
        classes=classes,
        attribution=attribution,
    )
    print(f"{options.out}: {kept * recipe.views} images of {kept} objects, {dropped} meshes dropped")
