"""Names that mean the same, folders and zips of every kind, damaged ones, and which images are taken."""

from __future__ import annotations

import io
import json
import random
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from epigraf_fast.data import ImageDataset
from epigraf_fast.errors import UserError
from epigraf_fast.files import Files, name_key, pair_names, walk

ANGLES = {"00/a.png": [0.5, 1.0, 0.0], "01/b.png": [-0.4, 1.5, 0.0]}
DATASET_JSON = json.dumps({"camera_angles": ANGLES}).encode()


def encode(image: PIL.Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return encode(PIL.Image.fromarray(pixels), kind)


def png16(color: int, channels: int, side: int = 8) -> bytes:
    """A PNG of 8x8 with 16 bits a channel, all 0x12FF, written by hand: Pillow writes grey ones only.

    Args:
        side: That its header tells.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + b"\x12\xff" * 8 * channels) * 8
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pack(path: Path, contents: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def unpack(path: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def fault(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def contents() -> dict[str, bytes]:
    """Of a good set."""
    return {"00/a.png": picture(0), "01/b.png": picture(1), "dataset.json": DATASET_JSON}


# Names


@pytest.mark.parametrize(
    "name",
    ["00/é.png", "00\\é.jpg", "./00//./é.PNG", "/00/é", "00/é.tiff", unicodedata.normalize("NFD", "00/é.webp")],
)
def test_spellings_of_one_name(name):
    assert name_key(name) == "00/é"


def test_what_is_no_suffix_of_an_image_counts():
    assert name_key("v1.2/img.0001") == "v1.2/img.0001"
    assert name_key("a.b.png") == "a.b"


@pytest.mark.parametrize("name", ["../a.png", "00/../../a.png", "..\\a.png", "00/.."])
def test_names_that_leave_the_set_are_refused(name):
    fault(lambda: name_key(name), name, "leaves the data set", "'..'")


@pytest.mark.parametrize(
    ("images", "entries", "pairs"),
    [
        (["00/a.png", "01/b.png"], ["01/b", "00\\a.jpg"], {"01/b.png": "01/b", "00/a.png": "00\\a.jpg"}),
        # A top folder that only the images or only the entries have, of one level or more.
        (["dogs/00/a.png", "dogs/01/b.png"], ["00/a.png"], {"dogs/00/a.png": "00/a.png"}),
        (["a.png", "b.png"], ["/home/me/cats/a.png", "/home/me/cats/b.png"],
         {"a.png": "/home/me/cats/a.png", "b.png": "/home/me/cats/b.png"}),
        # Renamed: both have one, and then every name has its partner.
        (["dogs/00/a.png", "dogs/01/b.png"], ["cats/00/a", "cats/01/b"],
         {"dogs/00/a.png": "cats/00/a", "dogs/01/b.png": "cats/01/b"}),
        # Other images of two folders that happen to share some names.
        (["00/a.png", "00/b.png"], ["01/b.png", "01/c.png"], {}),
        # The entry's suffix chooses among images of one stem.
        (["a.jpg", "a.png"], ["a.png"], {"a.png": "a.png"}),
        (["a.png"], [], {}),
    ],
)  # fmt: skip
def test_pairs(images, entries, pairs):
    assert pair_names(images, entries) == pairs


@pytest.mark.parametrize(
    ("images", "entries", "words"),
    [
        (["a.png"], ["a.png", "./a.png"], ("a.png and ./a.png", "same image")),
        (["a.png"], ["a", "a"], ("a and a", "same image")),
        (["a.png", "a.jpg"], ["a"], ("a.png and a.jpg both fit the name a",)),
        (["a.png"], ["../a.png"], ("../a.png", "leaves")),
    ],
)
def test_ambiguous_names_are_refused(images, entries, words):
    fault(lambda: pair_names(images, entries), *words)


def test_folders_that_are_links_are_read_and_circles_end(tmp_path):
    unpack(tmp_path / "disk", {"a.png": b"", "deep/b.png": b""})
    cats = tmp_path / "cats"
    cats.mkdir()
    (cats / "00").symlink_to(tmp_path / "disk")
    (cats / "01").symlink_to(tmp_path / "disk")  # twice the same is no circle
    (tmp_path / "disk" / "deep" / "up").symlink_to(tmp_path / "disk")
    (cats / "gone.png").symlink_to(tmp_path / "none")
    found = [file.relative_to(cats).as_posix() for file in walk(cats)]
    assert found == ["00/a.png", "00/deep/b.png", "01/a.png", "01/deep/b.png", "gone.png"]


# Sets, by reading them


def change(**metadata: object) -> bytes:
    return json.dumps({"camera_angles": ANGLES} | metadata).encode()


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_all_spellings_read_as_one_set(contents, kind, tmp_path):
    """Backslashes, another top folder, no suffixes, decomposed letters: the poses stay with their images."""
    names = {"00/a.png": "00\\é.png", "01/b.png": "01/ü.png"}
    angles = {
        unicodedata.normalize("NFD", "./00/é"): ANGLES["00/a.png"],
        unicodedata.normalize("NFD", "cats/01/ü.jpeg"): ANGLES["01/b.png"],
    }
    packed = {f"ffhq/{names[name]}": content for name, content in contents.items() if name != "dataset.json"}
    packed["ffhq/dataset.json"] = json.dumps({"camera_angles": angles}).encode()
    path = tmp_path / "cats"
    path = pack(path.with_suffix(".zip"), packed) if kind == "zip" else unpack(path, packed)
    dataset = ImageDataset(path, mirror=False)
    assert len(dataset) == 2
    np.testing.assert_allclose(dataset.angles, list(ANGLES.values()), rtol=1e-6)
    with PIL.Image.open(io.BytesIO(contents["01/b.png"])) as image:
        np.testing.assert_array_equal(dataset[1][0].permute(1, 2, 0), np.asarray(image))


def test_a_set_of_linked_folders(contents, tmp_path):
    unpack(tmp_path / "disk", contents)
    path = tmp_path / "cats"
    path.mkdir()
    (path / "00").symlink_to(tmp_path / "disk/00")
    (path / "01").symlink_to(tmp_path / "disk/01")
    (path / "dataset.json").symlink_to(tmp_path / "disk/dataset.json")
    assert ImageDataset(path, mirror=False).files == ["00/a.png", "01/b.png"]


def test_a_renamed_folder_and_a_link_to_it(contents, tmp_path):
    angles = {f"old/{name}": value for name, value in ANGLES.items()}
    contents["dataset.json"] = json.dumps({"camera_angles": angles}).encode()
    unpack(tmp_path / "new", contents)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("new", "link"):
        np.testing.assert_allclose(ImageDataset(tmp_path / name, mirror=False).angles, list(ANGLES.values()), rtol=1e-6)


def test_names_that_do_not_fit_show_one_of_each_side(contents, tmp_path):
    contents["dataset.json"] = change(camera_angles={"x/img1.png": [0.5, 1, 0], "y/img2.png": [0.5, 1, 0]})
    path = unpack(tmp_path / "cats", contents)
    fault(lambda: ImageDataset(path), "an image is 00/a.png, a name x/img1.png", "alike")


def test_poses_without_an_image_are_counted_and_named(contents, tmp_path):
    contents["dataset.json"] = change(camera_angles=ANGLES | {"02/y": [1, 1, 0], "02/x.png": [1, 1, 0]})
    dataset = ImageDataset(unpack(tmp_path / "cats", contents))
    assert dataset.unpaired == {"camera_angles": ["02/x.png", "02/y"]}
    assert dataset.remarks() == ['names in "camera_angles" without an image: 2, first 02/x.png']


def test_duplicates_and_names_outside_are_refused(contents, tmp_path):
    path = tmp_path / "cats.zip"
    twice = DATASET_JSON.replace(b"01/b", b"00/a")
    fault(lambda: ImageDataset(pack(path, contents | {"dataset.json": twice})), "'00/a.png' is there twice")
    labels = [["00/a.png", 1], ["01/b.png", 0], ["./00/a.png", 0]]
    pack(path, contents | {"dataset.json": change(labels=labels)})
    fault(lambda: ImageDataset(path, use_labels=True), "00/a.png and 00/a.png name the same image")
    pack(path, contents | {"dataset.json": change(camera_angles=ANGLES | {"../c.png": [1, 1, 0]})})
    fault(lambda: ImageDataset(path), "cats.zip", "../c.png", "leaves")
    fault(lambda: ImageDataset(pack(path, contents | {"../c.png": picture(2)})), "cats.zip", "../c.png", "leaves")
    outside = {f"../{name}": content for name, content in contents.items()}
    fault(lambda: ImageDataset(pack(path, outside)), "cats.zip: the name ../dataset.json leaves")
    pack(path, contents)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("00/a.png", picture(3))
    fault(lambda: ImageDataset(path), "cats.zip", "holds 00/a.png twice")


def test_a_set_by_a_relative_path(contents, tmp_path, monkeypatch):
    path = unpack(tmp_path / "cats", {f"{name}": content for name, content in contents.items()})
    for place, given in ((path / "00", ".."), (path, "."), (tmp_path, "cats/../cats")):
        monkeypatch.chdir(place)
        dataset = ImageDataset(given, mirror=False)
        assert (dataset.name, len(dataset)) == ("cats", 2)


def test_two_sets_in_one_folder(contents, tmp_path):
    unpack(tmp_path / "cats", contents)
    unpack(tmp_path / "dogs", contents)
    fault(lambda: Files(tmp_path), "cats/dataset.json and dogs/dataset.json", "one of the sets")


# Archives


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_can_be_read(contents, method, tmp_path):
    dataset = ImageDataset(pack(tmp_path / "cats.zip", contents, method))
    dataset.check_images()


def patched(path: Path, name: str, *, flags: int = 0, method: int | None = None, byte: int | None = None) -> None:
    """Changes the headers of a member, or a byte of its content."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    local = info.header_offset
    central = content.index(name.encode(), content.index(b"PK\x01\x02")) - 46
    for place in (local + 6, central + 8):
        content[place] |= flags
        if method is not None:
            content[place + 2] = method
    if byte is not None:
        content[local + 30 + len(name) + byte] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": 9}, ("deflate64", "repack with Deflate")),
        ({"method": 98}, ("repack with Deflate",)),
        ({"flags": 1}, ("encrypted", "repack with Deflate, without a password")),
        ({"flags": 0x40}, ("encrypt", "repack with Deflate")),
        ({"byte": 40}, ("cannot be read",)),
    ],
)
def test_members_that_cannot_be_read(contents, change, words, tmp_path):
    path = pack(tmp_path / "cats.zip", contents)
    patched(path, "01/b.png", **change)
    dataset = ImageDataset(path)
    fault(dataset.check_images, "cats.zip: image 01/b.png", *words)
    pack(path, contents)
    patched(path, "dataset.json", **change)
    fault(lambda: ImageDataset(path), "cats.zip: dataset.json", *words)


def test_a_wrong_checksum_of_a_stored_image(contents, tmp_path):
    """A BMP has no checksum of its own: only the zip's shows the flipped bit."""
    contents["01/b.bmp"] = picture(1, "bmp")
    del contents["01/b.png"]
    path = pack(tmp_path / "cats.zip", contents, zipfile.ZIP_STORED)
    patched(path, "01/b.bmp", byte=100)
    fault(ImageDataset(path).check_images, "image 01/b.bmp cannot be read", "CRC")


@pytest.mark.parametrize("depth", [900, 100_000])
def test_deeply_nested_json(contents, depth, tmp_path):
    nested = b"[" * depth + b"]" * depth
    path = unpack(tmp_path / "cats", contents | {"dataset.json": b'{"camera_angles": {"00/a.png": %s}}' % nested})
    fault(lambda: ImageDataset(path), "dataset.json")
    (path / "dataset.json").write_bytes(b'{"camera_angles": {"00/a": [1, 1, 0], "01/b": %s}}' % nested)
    fault(lambda: ImageDataset(path), "dataset.json")


def test_no_flipped_byte_gives_a_traceback(contents, tmp_path):
    """Whatever byte of a zip is damaged: the set is read, or one line says what is wrong."""
    contents = {
        "00/a.jpg": picture(0, "jpeg"),
        "00/a2.webp": picture(2, "webp"),
        "01/b.png": contents["01/b.png"],
        "01/c.bmp": picture(3, "bmp"),
        "dataset.json": change(camera_angles={n: [0.5, 1, 0] for n in ("00/a", "00/a2", "01/b", "01/c")}),
    }
    path = tmp_path / "cats.zip"
    whole = pack(path, contents, zipfile.ZIP_STORED).read_bytes()
    rng = random.Random(0)
    # Members' contents, which fail by their checksum, are most of the file; their headers and the directory are not.
    places = rng.sample(range(whole.index(b"PK\x01\x02")), 100) + rng.sample(range(len(whole) - 400, len(whole)), 150)

    def good(place: int) -> bool:
        damaged = bytearray(whole)
        damaged[place] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        return is_readable(lambda: ImageDataset(path).check_images())

    assert sum(map(good, places)) < len(places) / 2


def is_readable(read: Callable[[], object]) -> bool:
    """Whether it does not end in a UserError, which must be one line; any other exception fails the test."""
    message = None
    try:
        read()
    except UserError as error:
        message = str(error)
    assert message is None or "\n" not in message
    return message is None


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_no_damaged_image_gives_a_traceback(contents, kind, tmp_path):
    """In a folder, where no checksum of a zip finds out first."""
    name = f"01/b.{kind}"
    del contents["01/b.png"]
    path, whole = unpack(tmp_path / "cats", contents | {name: picture(1, kind)}), picture(1, kind)
    dataset, rng = ImageDataset(path), random.Random(0)

    def good(content: bytes) -> bool:
        (path / name).write_bytes(content)
        return is_readable(lambda: dataset[1])

    places = rng.sample(range(20, len(whole)), 60)
    flipped = [whole[:p] + bytes([whole[p] ^ rng.randrange(1, 256)]) + whole[p + 1 :] for p in places]
    good_ones = [*map(good, flipped)]
    assert kind != "png" or sum(good_ones) < len(places) / 4  # its pixels have a checksum, its last bytes do not count
    assert not any(good(whole[:place]) for place in places if place < len(whole) - 20)


def test_an_unreadable_folder_is_no_empty_one(contents, tmp_path, monkeypatch):
    path = unpack(tmp_path / "cats", contents)

    def scandir(folder: str) -> object:
        if folder.endswith("01"):
            raise PermissionError(13, "Permission denied", folder)
        return original(folder)

    original = __import__("os").scandir
    monkeypatch.setattr("epigraf_fast.files.os.scandir", scandir)
    fault(lambda: ImageDataset(path), "cannot be listed (Permission denied)")


# Images


def animation(kind: str) -> bytes:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encode(PIL.Image.new("P", (8, 8)), transparency=0), "transparent"),
        (png16(2, 3), "16 bits a channel"),
        (png16(0, 1), "16 bits a channel"),
        (png16(4, 2), "transparent"),
        (animation("png"), "an animation of 2 frames"),
        (animation("webp"), "an animation of 2 frames"),
        (encode(PIL.Image.new("F", (8, 8)), "tiff"), "of mode F"),
        (encode(PIL.Image.new("CMYK", (8, 8)), "jpeg"), "of mode CMYK"),
        (b"DDS " + struct.pack("<I", 124) + b"\0" * 120, "cannot be read"),  # Pillow's NotImplementedError
        (struct.pack(">4sIIII", b"\x89PNG", 0x0D0A1A0A, 13, 0x49484452, 10**9), "cannot be read"),
        (png16(0, 1, side=30_000), "cannot be read"),  # more pixels than Pillow takes
    ],
)
def test_images_that_are_not_8_bit_rgb(contents, content, words, tmp_path):
    path = unpack(tmp_path / "cats", contents | {"01/b.png": content})
    dataset = ImageDataset(path)
    fault(dataset.check_images, "image 01/b.png", words)
    fault(lambda: dataset[1], "image 01/b.png", words)


def test_a_photograph_with_others_behind_it(contents, tmp_path):
    """As some cameras save it: a JPEG, then its preview."""
    images = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encode(images[0], "mpo", save_all=True, append_images=images[1:])
    del contents["01/b.png"]
    image = ImageDataset(unpack(tmp_path / "cats", contents | {"01/b.jpg": content}))[1][0]
    assert image[0].min() > 250
    assert image[2].max() < 5


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_images_whose_colours_are_the_files_own(contents, mode, tmp_path):
    image = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).convert(mode)
    dataset = ImageDataset(unpack(tmp_path / "cats", contents | {"01/b.png": encode(image)}))
    np.testing.assert_array_equal(dataset[1][0].permute(1, 2, 0), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_upright(contents, kind, orientation, tmp_path):
    """EXIF's eight orientations, from where its standard puts the first row and column of the file."""
    shown = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    row, column = shown, shown.transpose(1, 0, 2)
    stored = [row, row[:, ::-1], row[::-1, ::-1], row[::-1], column, column[::-1], column[::-1, ::-1], column[:, ::-1]]
    image = PIL.Image.fromarray(np.ascontiguousarray(stored[orientation - 1]))
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    content = encode(image, kind, exif=exif, **options)
    dataset = ImageDataset(unpack(tmp_path / "cats", contents | {"01/b.png": content}))
    np.testing.assert_array_equal(dataset[1][0].permute(1, 2, 0), shown)
