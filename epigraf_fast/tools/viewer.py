"""A page in the browser that shows a trained generator.

$ epigraf viewer runs/demo

Drag to orbit, scroll to zoom. While anything moves, frames stream at the resolution that this machine renders in a
tenth of a second; at rest they sharpen. The page is served to this machine alone unless --host says otherwise.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import math
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..camera import Patch, cam2world_matrix
from ..config import Config
from ..errors import UserError
from ..models.generator import Generator, Images
from ..progress import waiting
from ..training.pretrained import load_generator
from ..training.sampling import known_labels, showing_pose
from .arguments import Checkpoint, Device, default, whole
from .command import heard, require
from .mesh import automatic_threshold, density_volume, extract, glb_of, measured, statistics
from .render import FFMPEG, SHOWN, Painted, Scene, pictures, video

FRAME_SECONDS = 0.1  # what a frame may take while something moves
LAST_SEED = 2**31 - 1
FPS = 24  # of a camera path
SMALLEST = 16  # pixels, the side of the coarsest frame


def angles_of(position: np.ndarray, target: np.ndarray) -> Tensor:
    """Yaw, pitch and roll [3] of a camera that looks from a position at a target."""
    outward = np.asarray(position, np.float64) - np.asarray(target, np.float64)
    outward /= max(np.linalg.norm(outward), 1e-12)
    yaw, pitch = math.atan2(outward[2], outward[0]), math.acos(max(-1.0, min(1.0, outward[1])))
    return torch.tensor([yaw, pitch, 0.0])


def fov_of(page_fov: float, distance: float, radius: float, widest: float, aspect: float = 1.0) -> float:
    """Degrees that the renderer, at its own distance, needs to show what the page's camera frames.

    Zooming in by coming closer becomes a narrower view, since the generator knows one distance only; it is never wider
    than in training.

    Args:
        page_fov: Vertical, radians.
        distance: Of the page's camera from its target.
        aspect: Of the page, width over height; the picture of a narrow one is as wide as the page, and shows as much.
    """
    half = math.tan(page_fov / 2) * min(1.0, aspect) * distance / radius
    return max(0.5, min(math.degrees(2 * math.atan(half)), widest))


def canvas(picture: np.ndarray, aspect: float) -> np.ndarray:
    """A square picture in the middle of a white one of the page's aspect (width over height)."""
    side = len(picture)
    height, width = (side, round(side * aspect)) if aspect >= 1 else (round(side / aspect), side)
    out = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    out[top : top + side, left : left + side] = picture
    return out


def free_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0.

    Raises:
        UserError: There is no such host here, or nothing can be served there.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} is no name or address ({reason}): take 127.0.0.1 or 0.0.0.0") from None
    family, _, _, _, address = found[0]
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        reason = error.strerror or error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise UserError(f"--host {host} is not of this machine ({reason}): take 127.0.0.1 or 0.0.0.0") from None
        raise UserError(f"port {port} of {host} cannot be used ({reason}): choose another with --port") from None


@dataclasses.dataclass
class View:
    """What one page shows: the camera that it asked for, and how far its picture has got."""

    angles: Tensor
    fov: float
    aspect: float
    asked: int = 1  # grows with every change
    painted: int = 0  # the change that the last frame has seen
    side: int = 0  # of the last frame


class Viewer:
    """The page, its controls, and the thread that paints.

    Args:
        config, generator: Of a checkpoint.
        host, port: Where to serve; port 0 takes any free one.
        resolution: Of sharp frames.
    """

    def __init__(self, config: Config, generator: Generator, host: str, port: int, resolution: int) -> None:
        viser, port = require("viser", "viser", "viewer"), free_port(host, port)
        self.config, self.generator, self.resolution = config, generator, resolution
        self.scene = Scene(generator, resolution)
        self.changed = threading.Condition()
        self.views: dict[int, View] = {}
        self.rate = 64**2 / FRAME_SECONDS  # pixels per second, measured as frames are painted
        self._painted: tuple[Any, list[Painted]] | None = None
        self._painted_lock = threading.Lock()
        self.server = viser.ViserServer(host=host, port=port, verbose=False)
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.server.get_port()}"
        self.server.gui.configure_theme(show_logo=False, show_share_button=False)  # sharing goes through the net
        self.server.gui.main_panel.dock_right()
        self.server.scene.set_up_direction("+y")
        self._place_camera()
        self._add_controls()
        self.server.on_client_connect(self._connected)
        self.server.on_client_disconnect(self._disconnected)
        self.running = True
        self.painter = threading.Thread(target=self._paint_forever, name="painter", daemon=True)
        self.painter.start()

    def _place_camera(self) -> None:
        camera = self.config.camera
        pose = showing_pose(self.generator)[None]
        start = self.server.initial_camera
        start.position = tuple(cam2world_matrix(pose, camera.radius)[0, :3, 3].tolist())
        start.look_at = (0.0, 0.0, 0.0)
        start.up = (0.0, 1.0, 0.0)
        start.fov = math.radians(camera.fov)
        start.near, start.far = camera.radius * 1e-2, camera.radius * 1e2

    def _add_controls(self) -> None:
        gui, count = self.server.gui, self.generator.label_dim
        self.seed = gui.add_number("Seed", 0, min=0, max=LAST_SEED, step=1)
        self.random = gui.add_button("Random seed")
        self.shown = gui.add_dropdown("Show", SHOWN)
        self.truncation = gui.add_slider("Truncation", 0.0, 1.0, 0.05, 1.0, hint="1 is none, 0 the mean object")
        known = known_labels(self.generator)
        self.label = gui.add_slider("Label", 0, count - 1, 1, int(known[0])) if count > 1 and known.ndim == 1 else None
        with gui.add_folder("Interpolation"):
            self.other_seed = gui.add_number("To seed", 1, min=0, max=LAST_SEED, step=1)
            self.mix = gui.add_slider("Mix", 0.0, 1.0, 0.01, 0.0)
            self.both = gui.add_checkbox("Side by side", False, hint="the two seeds, from one camera")
        with gui.add_folder("Save"):
            self.save_image = gui.add_button("Save image")
            self.add_stop = gui.add_button("Add camera", hint="the camera path goes through it, and back to the first")
            self.clear_stops = gui.add_button("Clear path")
            self.seconds = gui.add_number("Seconds", 4.0, min=0.5, max=60.0, step=0.5)
            self.save_video = gui.add_button("Save video")
        with gui.add_folder("Mesh"):
            self.automatic = gui.add_checkbox("Threshold found by itself", True)
            self.threshold = gui.add_number("Threshold", 0.0, step=0.1, hint="raw density", disabled=True)
            self.mesh_resolution = gui.add_slider("Mesh resolution", 16, 256, 16, 96)
            self.build = gui.add_button("Build mesh")
            self.show_mesh = gui.add_checkbox("Show mesh", False)
        self.status = gui.add_markdown("")
        for control in (*(self.seed, self.truncation, self.label, self.shown, self.other_seed, self.mix, self.both),):
            if control is not None:
                control.on_update(lambda _: self._touch())
        self.show_mesh.on_update(lambda _: self._show_mesh())
        self.build.on_click(lambda _: self._build_mesh())
        self.random.on_click(lambda _: setattr(self.seed, "value", secrets.randbelow(LAST_SEED + 1)))
        self.automatic.on_update(lambda _: setattr(self.threshold, "disabled", bool(self.automatic.value)))
        self.stops: list[View] = []
        self.save_image.on_click(lambda event: self._save(event.client, self.save_image, self._image))
        self.save_video.on_click(lambda event: self._save(event.client, self.save_video, self._video))
        self.add_stop.on_click(lambda event: self._add_stop(event.client))
        self.clear_stops.on_click(lambda _: self._clear_stops())
        self.mesh: Any = None

    # What the pages ask for

    def _connected(self, client: Any) -> None:
        self._look(client)
        client.camera.on_update(lambda _: self._look(client))

    def _disconnected(self, client: Any) -> None:
        with self.changed:
            self.views.pop(client.client_id, None)

    def _look(self, client: Any) -> None:
        """A page's camera has moved."""
        camera, own = client.camera, self.config.camera
        distance = float(np.linalg.norm(camera.position - camera.look_at))
        angles = angles_of(camera.position, camera.look_at)
        fov = fov_of(camera.fov, distance, own.radius, own.fov, float(camera.aspect))
        with self.changed:
            view = self.views.get(client.client_id)
            asked = 1 if view is None else view.asked + 1
            painted, side = (0, 0) if view is None else (view.painted, view.side)
            self.views[client.client_id] = View(angles, fov, float(camera.aspect), asked, painted, side)
            self.changed.notify()

    def _touch(self) -> None:
        """A control has moved: every page needs a new picture."""
        with self.changed:
            for view in self.views.values():
                view.asked += 1
            self.changed.notify()

    # Painting

    def painted_object(self) -> Painted:
        """The object that the controls describe; the first of two side by side."""
        return self.painted_objects()[0]

    def painted_objects(self) -> list[Painted]:
        """Those that are shown: one between the two seeds, or both."""
        label = [] if self.label is None else [int(self.label.value)]
        mixes = (0.0, 1.0) if self.both.value else (float(self.mix.value),)
        key = (self.seed.value, self.other_seed.value, mixes, self.truncation.value, *label)
        with self._painted_lock:
            if self._painted is None or self._painted[0] != key:
                self.scene.truncation = float(key[3])
                first, second = self.scene.ws([int(key[0]), int(key[1])], label)
                self._painted = key, [self.scene.paint(first.lerp(second, mix)) for mix in mixes]
            return self._painted[1]

    @torch.no_grad()
    def frame(self, view: View, side: int, outdated: Callable[[], bool] = lambda: False) -> np.ndarray | None:
        """A picture for a page, uint8 [H, W, 3], painted tile by tile; None if it is outdated before it is done."""
        objects = self.painted_objects()
        parts = [self._square(painted, view, side, outdated) for painted in objects]
        if any(part is None for part in parts):
            return None
        return np.concatenate([canvas(part, view.aspect / len(parts)) for part in parts], axis=1)

    def _square(self, painted: Painted, view: View, side: int, outdated: Callable[[], bool]) -> np.ndarray | None:
        """One object, uint8 [side, side, 3]: colours, depth or normals."""
        tile, device = min(side, self._moving_side()), painted.planes.device
        whole = Images(*(torch.empty(1, channels, side, side) for channels in (3, 1, 1)))
        for row, column in itertools.product(range(0, side, tile), repeat=2):
            if outdated():
                return None
            row, column = min(row, side - tile), min(column, side - tile)
            # A patch whose pixels are those of the whole picture.
            patch = None
            if tile < side:
                offset = torch.tensor([[column, side - tile - row]], device=device) / (side - 1)
                patch = Patch(torch.full((1,), (tile - 1) / (side - 1), device=device), offset)
            images = self.generator.render(
                painted.planes,
                view.angles.to(device)[None],
                tile,
                patch,
                ws=painted.ws,
                fov=view.fov,
                stochastic=False,
            )
            for target, part in zip(whole, images, strict=True):
                target[:, :, row : row + tile, column : column + tile] = part.cpu()
        shown = str(self.shown.value)
        picture = pictures(whole, view.angles[None], self.generator, (shown,), view.fov)[shown]
        return picture[0].permute(1, 2, 0).numpy()

    def _moving_side(self) -> int:
        """The side of a frame, a power of two, that takes about FRAME_SECONDS."""
        side = 2 ** int(math.log2(max(SMALLEST, math.sqrt(self.rate * FRAME_SECONDS))))
        return min(side, self.resolution)

    def _next(self) -> tuple[int, View, int] | None:
        """A page that waits, and the side of its next frame; pages in motion first."""
        for client_id, view in self.views.items():
            if view.painted != view.asked:
                return client_id, dataclasses.replace(view), self._moving_side()
        for client_id, view in self.views.items():
            if view.side < self.resolution:
                return client_id, dataclasses.replace(view), min(2 * view.side, self.resolution)
        return None

    def _paint_forever(self) -> None:
        while self.running:
            with self.changed:
                work = self._next()
                if work is None:
                    self.changed.wait(timeout=1.0)
                    continue
            client_id, view, side = work
            try:
                reached = self._paint(client_id, view, side)
            except Exception as error:  # whatever one picture trips over, the next ones are painted
                self.status.content = f"cannot paint: {type(error).__name__}: {error}"
                reached = self.resolution
            with self.changed:
                current = self.views.get(client_id)
                if current is not None and reached:
                    current.painted, current.side = view.asked, reached

    def _paint(self, client_id: int, view: View, side: int) -> int:
        """Sends a frame. Returns the side that the page has now, 0 if the frame was given up."""
        client = self.server.get_clients().get(client_id)
        if client is None:
            return self.resolution
        if self.show_mesh.value:
            client.scene.set_background_image(None)
            return self.resolution

        def outdated() -> bool:
            current = self.views.get(client_id)
            return not self.running or current is None or (view.painted == view.asked and current.asked != view.asked)

        begun = time.perf_counter()
        picture = self.frame(view, side, outdated)
        if picture is None:
            return 0
        seconds = time.perf_counter() - begun
        self.rate = 0.5 * self.rate + 0.5 * side**2 / max(seconds, 1e-6)
        sharp = side == self.resolution
        client.scene.set_background_image(picture, format="png" if sharp else "jpeg", jpeg_quality=80)
        self.status.content = f"{side}x{side}, {1000 * seconds:.0f} ms"
        return side

    # Files

    def _save(self, client: Any, button: Any, make: Callable[[Any], tuple[str, bytes]]) -> None:
        """Sends a page what it asked for as a download."""
        button.disabled = True
        try:
            name, content = make(client)
            client.send_file_download(name, content)
            self.status.content = f"saved {name}"
        except (UserError, OSError) as error:
            self.status.content = f"not saved: {error}"
        finally:
            button.disabled = False

    def _image(self, client: Any) -> tuple[str, bytes]:
        """The page's picture, sharp."""
        with self.changed:
            view = self.views.get(client.client_id)
        if view is None:
            raise UserError("the page is gone")
        file = io.BytesIO()
        PIL.Image.fromarray(self.frame(view, self.resolution)).save(file, "PNG")
        return f"seed-{int(self.seed.value)}-{self.shown.value}.png", file.getvalue()

    def _add_stop(self, client: Any) -> None:
        with self.changed:
            view = self.views.get(client.client_id)
        if view is not None:
            self.stops.append(view)
            self.status.content = f"{len(self.stops)} cameras in the path"

    def _clear_stops(self) -> None:
        self.stops.clear()
        self.status.content = "the camera path is empty"

    def path(self, frames: int) -> list[View]:
        """Cameras from stop to stop and back to the first, turning the short way; of one stop, once around it."""
        if not self.stops:
            raise UserError("the camera path is empty: look from somewhere and press Add camera")
        if len(self.stops) == 1:
            turn = torch.arange(frames) * (2 * math.pi / frames)
            return [
                dataclasses.replace(self.stops[0], angles=self.stops[0].angles + torch.tensor([float(t), 0, 0]))
                for t in turn
            ]
        views = []
        for number in range(frames):
            low, share = divmod(number * len(self.stops) / frames, 1)
            a, b = (self.stops[(int(low) + i) % len(self.stops)] for i in range(2))
            share = (1 - math.cos(math.pi * share)) / 2  # slow at the stops
            turn = b.angles - a.angles
            turn[0] = (turn[0] + math.pi) % (2 * math.pi) - math.pi
            views.append(dataclasses.replace(a, angles=a.angles + share * turn, fov=a.fov + share * (b.fov - a.fov)))
        return views

    def _video(self, client: Any) -> tuple[str, bytes]:
        """The camera path, H.264."""
        require(*FFMPEG)
        views = self.path(max(2, round(float(self.seconds.value) * FPS)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "path.mp4")
            with video(path, FPS) as add:
                for view in self._progress(views, "frames"):
                    add(self.frame(dataclasses.replace(view, aspect=2.0 if self.both.value else 1.0), self.resolution))
            return f"seed-{int(self.seed.value)}-path.mp4", path.read_bytes()

    # The mesh

    def _build_mesh(self) -> None:
        self.build.disabled = True
        try:
            self.make_mesh()
            self.show_mesh.value = True
        except UserError as error:
            self.status.content = f"no mesh: {error}"
        finally:
            self.build.disabled = False

    def make_mesh(self) -> None:
        """Puts the surface of the current object into the scene."""
        painted, threshold = self.painted_object(), float(self.threshold.value)
        automatic = bool(self.automatic.value)
        volume = density_volume(self.generator, painted.planes, int(self.mesh_resolution.value), self._progress)
        if automatic:
            whole_sphere = self.config.camera.prior == "spherical_uniform"
            threshold = automatic_threshold(self.generator, painted.planes, whole_sphere, self._progress)
            self.threshold.value = round(threshold, 4)
        surface = extract(self.generator, painted.planes, volume, threshold, self._progress)
        self.mesh = self.server.scene.add_glb("/mesh", glb_of(surface), visible=bool(self.show_mesh.value))
        how = "found by itself" if automatic else "given"
        self.status.content = f"threshold {threshold:.4g} ({how})\n\n" + "\n\n".join(statistics(measured(surface)))

    def _progress(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        """Shows how far something long is, and gives it up when the viewer ends."""
        for number, item in enumerate(items):
            if not self.running:
                raise UserError("the viewer ends")
            self.status.content = f"working ... {what}: {number}/{len(items)}"
            yield item

    def _show_mesh(self) -> None:
        if self.mesh is not None:
            self.mesh.visible = bool(self.show_mesh.value)
        self._touch()

    def stop(self) -> None:
        """Ends the painter and the server."""
        self.running = False
        with self.changed:
            self.changed.notify()
        self.painter.join(timeout=3)
        self.server.stop()


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `epigraf viewer`."""

    checkpoint: Checkpoint
    host: str = "127.0.0.1"
    """Who is listened to: 127.0.0.1 is this machine alone, 0.0.0.0 the whole network."""
    port: Annotated[int, whole(0, 65535)] = 8080
    """Port of the page; 0 takes a free one."""
    resolution: Annotated[int | None, whole(SMALLEST, 4096), default("four times that of training, up to 1024")] = None
    """Pixels a side of sharp frames."""
    device: Device = None


def run(options: Options) -> None:
    require("viser", "viser", "viewer")
    port = free_port(options.host, options.port)
    with waiting("reading the checkpoint"):
        config, generator = load_generator(options.checkpoint, options.device)
        resolution = options.resolution or max(config.resolution, min(4 * config.resolution, 1024))
        viewer = Viewer(config, generator, options.host, port, resolution)
    print(f"viewer at {viewer.address} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:  # how a viewer is meant to end
        heard()
        viewer.stop()
