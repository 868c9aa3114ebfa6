"""The viewer: what it computes, what it sends, and the page in a real browser."""

from __future__ import annotations

import io
import math
import re
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from checks import HANG, assert_close
from command_lines import run_tool
from epigraf_fast.camera import cam2world_matrix
from epigraf_fast.errors import UserError
from epigraf_fast.tools import viewer
from epigraf_fast.training.log import to_uint8
from epigraf_fast.training.pretrained import load_generator

RESOLUTION = 64


@pytest.mark.parametrize("angles", [(0.3, 1.2), (-2.9, 0.2), (1.5, 2.8), (math.pi / 2, math.pi / 2)])
def test_the_page_camera_becomes_our_angles(angles: tuple[float, float]) -> None:
    expected = torch.tensor([[*angles, 0.0]])
    position = cam2world_matrix(expected, 3.0)[0, :3, 3].numpy()
    target = np.array([0.5, -0.2, 0.1])
    assert_close(viewer.angles_of(position + target, target), expected[0], "angles")


def test_zoom_is_a_narrower_view() -> None:
    fov = math.radians(30)
    assert viewer.fov_of(fov, 2.0, 2.0, 30.0) == pytest.approx(30)
    half = viewer.fov_of(fov, 1.0, 2.0, 30.0)
    assert math.tan(math.radians(half) / 2) == pytest.approx(math.tan(fov / 2) / 2)
    assert viewer.fov_of(fov, 9.0, 2.0, 30.0) == 30.0
    assert viewer.fov_of(fov, 0.0, 2.0, 30.0) > 0
    assert viewer.fov_of(fov, 2.0, 2.0, 30.0, aspect=0.5) == half  # a narrow page, beside whose picture a mesh would be
    assert viewer.fov_of(fov, 2.0, 2.0, 30.0, aspect=2.0) == pytest.approx(30)


@pytest.mark.parametrize(("aspect", "shape"), [(2.0, (4, 8)), (1.0, (4, 4)), (0.5, (8, 4))])
def test_canvas_centres_the_picture(aspect: float, shape: tuple[int, int]) -> None:
    out = viewer.canvas(np.zeros((4, 4, 3), np.uint8), aspect)
    assert out.shape == (*shape, 3)
    top, left = (shape[0] - 4) // 2, (shape[1] - 4) // 2
    assert not out[top : top + 4, left : left + 4].any()
    assert (out == 255).sum() == 3 * (shape[0] * shape[1] - 16)


def test_an_occupied_port_is_one_line(tiny_run: Path, one_error_line: Callable[..., str]) -> None:
    pytest.importorskip("viser", reason="needs the extra viewer")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = one_error_line(viewer, tiny_run, "--port", port)
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use): choose another with --port" in message
    assert "--port must be" in one_error_line(viewer, tiny_run, "--port", 70000)
    assert "there is no checkpoint" in one_error_line(viewer, "nowhere")


@pytest.mark.parametrize("port", [0, 8080])
def test_a_host_that_is_not_here_is_one_line_before_any_work(port: int, one_error_line: Callable[..., str]) -> None:
    pytest.importorskip("viser", reason="needs the extra viewer")
    for host, words in (
        ("no.such.host.invalid", "--host no.such.host.invalid is no name or address ("),
        ("a..b", "--host a..b is no name or address ("),
        ("x" * 70, "is no name or address ("),
        ("192.0.2.1", "--host 192.0.2.1 is not of this machine (Cannot assign requested address): take 127.0.0.1"),
        ("2001:db8::1", "--host 2001:db8::1 is not of this machine ("),
        ("[::1]", "--host [::1] is no name or address ("),
    ):
        assert words in one_error_line(viewer, "nowhere", "--host", host, "--port", port)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 on this machine")
def test_ipv6_is_served(tiny_run: Path) -> None:
    pytest.importorskip("viser", reason="needs the extra viewer")
    config, generator = load_generator(tiny_run, "cpu")
    running = viewer.Viewer(config, generator, "::1", 0, RESOLUTION)
    try:
        assert re.fullmatch(r"http://\[::1\]:\d+", running.address)
        with urllib.request.urlopen(running.address, timeout=HANG) as answer:
            assert answer.status == 200
    finally:
        running.stop()


def test_ctrl_c_ends_a_viewer(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the page's line says, and no fault."""
    pytest.importorskip("viser", reason="needs the extra viewer")
    stopped, stop = [], viewer.Viewer.stop

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    def stopping(self: viewer.Viewer) -> None:
        stopped.append(self)
        monkeypatch.undo()
        stop(self)

    monkeypatch.setattr(viewer.Viewer, "stop", stopping)
    monkeypatch.setattr(viewer, "time", SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))
    run_tool(viewer, tiny_run, "--port", "0", "--device", "cpu")
    assert len(stopped) == 1
    assert not stopped[0].painter.is_alive()


def test_missing_viser_is_one_line(
    tiny_run: Path, one_error_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "viser", None)
    assert "viser is not installed: pip install -e '.[viewer]'" in one_error_line(viewer, tiny_run)


@pytest.fixture
def running(tiny_run: Path) -> Iterator[viewer.Viewer]:
    pytest.importorskip("viser", reason="needs the extra viewer")
    config, generator = load_generator(tiny_run, "cpu")
    running = viewer.Viewer(config, generator, "127.0.0.1", 0, RESOLUTION)
    yield running
    running.stop()


@pytest.mark.parametrize(("values", "first"), [([1, 2], 1), ([[0.5, 1.0, 0.0]], None)])
def test_the_first_object_is_of_a_class_with_images(tiny_run: Path, values: list, first: int | None) -> None:
    """And where labels are vectors there is no class to choose."""
    pytest.importorskip("viser", reason="needs the extra viewer")
    config, generator = load_generator(tiny_run, "cpu")
    generator.label_values = torch.tensor(values)
    running = viewer.Viewer(config, generator, "127.0.0.1", 0, RESOLUTION)
    try:
        assert (running.label and running.label.value) == first
        painted = running.painted_object()
        expected = running.scene.ws([0], [] if first is None else [first])
        assert_close(painted.ws, expected, "ws")
    finally:
        running.stop()


class Page:
    """Stands in for a client of viser: a camera, and a scene that keeps what it is sent."""

    client_id = 7

    def __init__(self, running: viewer.Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running, self.pictures = running, []
        self.moved: Callable[[Any], None] | None = None
        position = cam2world_matrix(torch.tensor([[0.3, 1.2, 0.0]]), 1.0)[0, :3, 3].numpy()
        self.camera = SimpleNamespace(
            position=position, look_at=np.zeros(3), fov=math.radians(30), aspect=1.0, on_update=self._on_update
        )
        self.scene = SimpleNamespace(set_background_image=lambda image, **_: self.pictures.append(image))
        monkeypatch.setattr(running.server, "get_clients", lambda: {self.client_id: self})

    def _on_update(self, callback: Callable[[Any], None]) -> None:
        self.moved = callback

    def wait(self, count: int = 1) -> list[np.ndarray]:
        """What arrived since the last call, once it is sharp."""
        deadline = time.monotonic() + HANG
        while not (self.pictures and self.running._next() is None and len(self.pictures) >= count):
            assert time.monotonic() < deadline, self.running.status.content
            time.sleep(0.01)
        arrived, self.pictures = self.pictures, []
        return arrived


@pytest.fixture
def page(running: viewer.Viewer, monkeypatch: pytest.MonkeyPatch) -> Page:
    page = Page(running, monkeypatch)
    monkeypatch.setattr(viewer, "FRAME_SECONDS", 1e-9)  # a machine so slow that it starts at the coarsest
    running._connected(page)
    return page


def test_frames_start_coarse_and_sharpen(running: viewer.Viewer, page: Page) -> None:
    pictures = page.wait()
    assert [len(picture) for picture in pictures] == [16, 32, 64]
    # The last one, put together from tiles, is the picture that the generator gives at once.
    painted, view = running.painted_object(), running.views[page.client_id]
    with torch.no_grad():
        images = running.generator.render(
            painted.planes, view.angles[None], RESOLUTION, ws=painted.ws, fov=view.fov, stochastic=False
        )
    expected = to_uint8(images.rgb[0]).permute(1, 2, 0).numpy()
    assert np.abs(pictures[-1].astype(int) - expected).max() <= 1


def test_every_control_changes_the_picture(running: viewer.Viewer, page: Page) -> None:
    last = page.wait()[-1]
    for control, value in (
        (running.seed, 5),
        (running.truncation, 0.3),
        (running.label, 2),
        (running.mix, 0.5),
        (running.other_seed, 9),
        (running.shown, "depth"),
        (running.shown, "normals"),
    ):
        control.value = value
        pictures = page.wait()
        assert len(pictures[0]) == 16
        assert (pictures[-1] != last).any(), control.label
        last = pictures[-1]
    page.camera.position = -page.camera.position
    page.moved(None)
    assert (page.wait()[-1] != last).any()


def test_sharpening_is_given_up_when_something_moves(running: viewer.Viewer, page: Page) -> None:
    page.wait()
    view = running.views[page.client_id]
    assert running.frame(view, RESOLUTION, lambda: True) is None
    answers = iter([False, False, True])
    assert running.frame(view, RESOLUTION, lambda: next(answers)) is None


def test_a_fault_is_shown_and_survived(running: viewer.Viewer, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    page.wait()
    with monkeypatch.context() as broken:
        broken.setattr(running, "frame", lambda *_: 1 / 0)
        running.seed.value = 3
        deadline = time.monotonic() + HANG
        while "cannot paint: ZeroDivisionError" not in running.status.content:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    running.seed.value = 4
    assert len(page.wait()[-1]) == RESOLUTION


def test_two_seeds_side_by_side(running: viewer.Viewer, page: Page) -> None:
    page.wait()
    running.seed.value, running.other_seed.value, running.both.value = 3_000_000_000 % 2**31, 4, True
    both = page.wait()[-1]
    assert both.shape == (2 * RESOLUTION, 2 * RESOLUTION, 3)  # on a square page: halves of twice their width
    halves = both[RESOLUTION // 2 : -RESOLUTION // 2].reshape(RESOLUTION, 2, RESOLUTION, 3)
    view = running.views[page.client_id]
    running.both.value = False
    for half, mix in ((0, 0.0), (1, 1.0)):
        running.mix.value = mix
        assert np.abs(halves[:, half].astype(int) - running.frame(view, RESOLUTION)).max() <= 1


def test_images_and_camera_paths_are_saved(running: viewer.Viewer, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="needs the extra tools")
    files: dict[str, bytes] = {}
    page.send_file_download = lambda name, content: files.update({name: content})
    sharp = page.wait()[-1]
    running._save(page, running.save_image, running._image)
    assert (np.asarray(PIL.Image.open(io.BytesIO(files["seed-0-rgb.png"]))) == sharp).all()
    running._save(page, running.save_video, running._video)
    assert "not saved: the camera path is empty" in running.status.content
    running._add_stop(page)
    first = running.stops[0].angles
    around = running.path(4)
    assert [round(float(view.angles[0] - first[0]), 4) for view in around] == [0, 1.5708, 3.1416, 4.7124]
    page.camera.position = page.camera.position * np.array([1, -1, 1])
    page.moved(None)
    running._add_stop(page)
    stops = [stop.angles for stop in running.stops]
    path = [view.angles for view in running.path(4)]
    for found, expected in zip(path, (stops[0], (stops[0] + stops[1]) / 2, stops[1], path[1]), strict=True):
        torch.testing.assert_close(found, expected)
    monkeypatch.setattr(running, "resolution", 16)
    running.seconds.value = 0.5
    running._save(page, running.save_video, running._video)
    assert files["seed-0-path.mp4"][4:8] == b"ftyp"
    assert not running.save_video.disabled


def test_a_page_that_leaves_is_forgotten(running: viewer.Viewer, page: Page) -> None:
    page.wait()
    running._disconnected(page)
    assert not running.views


def test_the_mesh_comes_and_goes(running: viewer.Viewer, page: Page) -> None:
    pytest.importorskip("skimage", reason="needs the extra viewer")
    page.wait()
    running.mesh_resolution.value = 16
    running._build_mesh()
    assert "components: " in running.status.content
    assert "(found by itself)" in running.status.content
    assert running.mesh.visible
    assert page.wait()[-1] is None  # the picture makes place
    running.show_mesh.value = False
    assert len(page.wait()[-1]) == RESOLUTION
    assert not running.mesh.visible
    assert running.threshold.value != 0
    assert running.threshold.disabled
    running.automatic.value = False
    assert not running.threshold.disabled
    running.threshold.value = 1e9
    running._build_mesh()
    assert "no mesh: --threshold must be between" in running.status.content
    assert not running.build.disabled


def test_a_mesh_shows_how_far_it_is_and_ends_with_the_viewer(running: viewer.Viewer) -> None:
    steps = running._progress(range(4), "points")
    assert [next(steps), next(steps)] == [0, 1]
    assert running.status.content == "working ... points: 1/4"
    running.running = False
    with pytest.raises(UserError, match="the viewer ends"):
        next(steps)


def test_the_page_is_served_here_alone(running: viewer.Viewer) -> None:
    with urllib.request.urlopen(running.address, timeout=HANG) as answer:
        page = answer.read().decode()
        assert answer.status == 200
    assert "<html" in page
    assert running.server.get_host() == "127.0.0.1"
    port = running.server.get_port()
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used"):
        viewer.free_port("127.0.0.1", port)


# A real browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_in_a_browser(running: viewer.Viewer) -> None:
    """The page loads, a slider changes the picture, dragging turns it, the mesh shows; no error, no foreign address."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    errors, addresses = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        page = browser.new_page(viewport={"width": 720, "height": 360})
        page.set_default_timeout(180_000)  # WebGL in software, perhaps on a busy machine
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.on("websocket", lambda socket: addresses.append(socket.url))
        page.goto(running.address)
        page.get_by_text("Seed", exact=True).wait_for()

        def picture() -> np.ndarray:
            """The left half of the page, once its picture is sharp and has stayed the same for a while."""
            deadline, last = time.monotonic() + HANG, None
            while True:
                assert time.monotonic() < deadline, running.status.content
                time.sleep(0.5)
                if not running.views or running._next() is not None:
                    continue
                shot = page.screenshot(clip={"x": 0, "y": 130, "width": 360, "height": 230})
                now = np.asarray(PIL.Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)
                if last is not None and np.abs(now - last).mean() < 0.05:
                    return now
                last = now

        def changed(before: np.ndarray, after: np.ndarray) -> float:
            return float(np.abs(before - after).mean())

        first = picture()
        assert first.std() > 5
        page.get_by_role("textbox").first.focus()
        for _ in range(5):
            page.keyboard.press("ArrowUp")
        second = picture()
        assert running.seed.value == 5
        assert changed(first, second) > 1

        before = running.views[next(iter(running.views))].angles.clone()
        page.mouse.move(180, 250)
        page.mouse.down()
        page.mouse.move(240, 280, steps=8)
        page.mouse.up()
        third = picture()
        assert (running.views[next(iter(running.views))].angles - before).abs().max() > 0.05
        assert changed(second, third) > 1

        page.get_by_role("button", name="Build mesh").click()
        deadline = time.monotonic() + HANG
        while running.mesh is None:
            assert time.monotonic() < deadline, running.status.content
            time.sleep(0.1)
        assert changed(third, picture()) > 1
        browser.close()
    assert not errors
    allowed = (running.address, running.address.replace("http", "ws"), f"blob:{running.address}", "data:")
    assert addresses
    assert all(address.startswith(allowed) for address in addresses), addresses
