"""The one reader of pictures: kinds of files and sources, what is refused, and that metadata never matters."""

import io
import struct
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff import addresses, pictures
from unidiff.errors import DamagedFile
from unidiff.pictures import as_rgb, decode_picture, open_picture


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, row: bytes, width: int, *extra: bytes) -> bytes:
    """A PNG of one row, with chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 6, width: int = 9, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_every_source_gives_the_same_pixels(kind, tmp_path):
    picture = noise()
    data = saved(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "a picture with no ending"
    path.write_bytes(data)
    with open(path, "rb") as file:
        sources = [path, str(path), path.as_uri(), f"file://localhost{path.as_uri()[7:]}", data, bytearray(data)]
        for source in [*sources, file, picture, Image.open(path)]:
            assert pixels(open_picture(source)) == pixels(picture)


def test_jpeg_and_gif_are_read():
    flat = Image.new("RGB", (8, 8), (200, 30, 30))
    assert np.abs(np.asarray(open_picture(saved(flat, "JPEG"))).astype(int) - np.asarray(flat)).max() < 8
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert pixels(open_picture(data))[0][0] == [255, 0, 0], kind


@pytest.mark.parametrize(
    ("depth", "raw", "key", "expected"),
    [
        (1, b"\x50", 1, [0, 255, 0, 255]),  # white everywhere: the ones are see-through
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x0f\xf3", 0, [255, 255, 255, 51]),
        (8, b"\x00\x07\x08\xff", 7, [0, 255, 8, 255]),
        (16, struct.pack(">HHHH", 0x8080, 65535, 0, 0x1234), 0x8080, [255, 255, 0, 18]),
        (16, struct.pack(">HHHH", 65535, 0, 0x8080, 0x100), 0, [255, 255, 128, 1]),
    ],
)
def test_grey_with_a_transparent_value(depth, raw, key, expected):
    data = png(depth, 0, raw, 4, chunk(b"tRNS", struct.pack(">H", key)))
    assert [p[0] for p in pixels(open_picture(data))[0]] == expected


def test_deep_colours_and_their_transparent_value():
    data = png(
        16, 2, struct.pack(">6H", 0x1200, 0, 0, 0xFF00, 0, 0), 2, chunk(b"tRNS", struct.pack(">3H", 0x1200, 0, 0))
    )
    assert pixels(open_picture(data)) == [[[255, 255, 255], [255, 0, 0]]]
    assert pixels(open_picture(data, background="black")) == [[[0, 0, 0], [255, 0, 0]]]


def test_palettes_with_transparency():
    palette, row = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255, 0, 255, 0])), b"\x00\x01\x02"
    data = png(8, 3, row, 3, palette, chunk(b"tRNS", bytes([0, 255, 128])))
    assert pixels(open_picture(data)) == [[[255, 255, 255], [0, 0, 255], [127, 255, 127]]]
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    assert pixels(open_picture(saved(image, "GIF", transparency=0))) == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I", "F"],
)
def test_white_and_black_in_every_mode(mode):
    """Whatever Pillow holds a picture in, black is black and white is white."""
    both = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((np.asarray(both).astype(np.float64) * (1 / 255 if mode == "F" else 257)).astype(kind))
    elif mode == "I;16B":
        image = Image.frombytes("I;16B", (2, 1), b"\0\0\xff\xff")
    elif mode in ("La", "RGBa"):
        image = both.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode in ("PA", "HSV", "YCbCr", "CMYK", "RGBX"):
        image = both.convert("RGB").convert({"PA": "P"}.get(mode, mode)).convert(mode)
    else:
        image = both.convert(mode)
    assert image.mode == mode
    assert pixels(open_picture(image)) == [[[0, 0, 0], [255, 255, 255]]]


def test_modes_whose_scale_is_unknown_are_refused():
    for image in (
        Image.new("I", (2, 2), 200),
        Image.new("I", (2, 2), 70_000),
        Image.new("I", (2, 2), -1),
        Image.new("F", (2, 2), 200.0),
        Image.new("F", (2, 2), float("nan")),
        Image.new("RGB", (0, 4)),
    ):
        with pytest.raises(DamagedFile, match=r"images\[3\]"):
            open_picture(image, "images[3]")


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "in memory"])
def test_pictures_are_upright(orientation, kind):
    picture = Image.new("RGB", (8, 16), "white")
    picture.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(picture, "PNG" if kind == "in memory" else kind, exif=exif, **options)
    image = open_picture(Image.open(io.BytesIO(data)) if kind == "in memory" else data)
    assert image.size == ((16, 8) if orientation in (5, 6, 7, 8) else (8, 16))
    dark = {2: (2, 2), 3: (6, 14), 4: (6, 14), 5: (2, 2), 6: (14, 6), 7: (14, 6), 8: (2, 2)}.get(orientation, (2, 2))
    assert image.getpixel(dark)[0] < 60
    assert pixels(open_picture(image)) == pixels(image)  # never turned twice


BAD_METADATA = {
    "eXIf": b"garbage!", "zTXt": b"k\0\0" + zlib.compress(b"a" * 3_000_000), "tEXt": b"", "iTXt": b"k\0\1",
    "iCCP": b"k\0\0" + zlib.compress(b"a" * 3_000_000), "pHYs": b"a", "cHRM": b"a", "gAMA": b"", "sRGB": b"", "tIME": b"",
    "acTL": b"a", "fcTL": b"a", "fdAT": b"a", "bKGD": b"", "sBIT": b"", "hIST": b"", "sPLT": b"x", "cICP": b"", "zzZz": b"?",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_METADATA)
def test_malformed_metadata_of_a_png_is_ignored(kind):
    plain = png(8, 0, b"\1\2\3\4", 4)
    for extra in (chunk(kind.encode(), BAD_METADATA[kind]), chunk(kind.encode(), BAD_METADATA[kind])[:-1] + b"?"):
        assert pixels(open_picture(png(8, 0, b"\1\2\3\4", 4, extra))) == pixels(open_picture(plain))
        after = plain[:-12] + extra + plain[-12:]
        assert pixels(open_picture(after)) == pixels(open_picture(plain))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 15),
    st.binary(max_size=60),
    st.sampled_from([b"", b"Exif\0\0", b"ICC_PROFILE\0", b"MPF\0", b"JFIF\0", b"Adobe"]),
)
def test_malformed_metadata_of_a_jpeg_is_ignored(segment, data, head):
    if segment == 14 and head == b"Adobe":  # says how colours are coded, so it is no metadata
        return
    plain = saved(noise(16, 16), "JPEG")
    body = head + data
    marked = plain[:2] + bytes([0xFF, 0xE0 + segment]) + struct.pack(">H", len(body) + 2) + body + plain[2:]
    image = open_picture(marked)
    assert sorted(image.size) == [16, 16]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_cut_pictures_are_refused(kind):
    data = saved(noise(40, 40), kind)
    for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.95):
        with pytest.raises(DamagedFile, match=r"images\[1\]"):
            open_picture(data[: int(len(data) * share)], "images[1]")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_damage_gives_a_picture_or_a_sentence(kind, changes):
    data = bytearray(saved(noise(12, 10), kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        assert open_picture(bytes(data), "images[0]").mode == "RGB"
    except DamagedFile as error:
        assert "images[0]" in str(error) and " at 0x" not in str(error) and "\n" not in str(error)


def test_other_formats_are_refused_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.call", lambda *a, **k: pytest.fail("a program was started"))
    eps = saved(noise(), "EPS")
    for data, word in (
        (eps, "PostScript"), (b"%PDF-1.4", "PDF"), (b"<svg/>", "SVG"), (saved(noise(), "TIFF"), "TIFF"),
        (saved(noise(), "PPM"), "of another kind"), (b"", "empty"), (b"text", "of another kind"),
    ):  # fmt: skip
        path = tmp_path / "drawing.png"
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match=rf"drawing\.png.*{word}.*PNG, JPEG, WebP, GIF or BMP"):
            open_picture(path)
    with pytest.raises(DamagedFile, match="EPS"):
        open_picture(Image.open(io.BytesIO(eps)))


def test_large_claims_are_refused_before_decoding(recwarn):
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(DamagedFile, match="12000 x 12000 pixels, more than"):
        open_picture(data)
    with pytest.raises(DamagedFile, match="9 x 6 pixels, more than the 53"):
        open_picture(saved(noise(), "PNG"), max_pixels=53)
    with pytest.raises(DamagedFile, match="more than the 53"):
        open_picture(noise(), max_pixels=53)
    assert not recwarn.list


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no-such\.png' does not exist"):
        open_picture(tmp_path / "no-such.png")
    with pytest.raises(FileNotFoundError, match=r"images\[2\].*no-such"):
        open_picture(str(tmp_path / "no-such.png"), "images[2]")
    link = tmp_path / "dangling.png"
    link.symlink_to(tmp_path / "gone.png")
    for source, words in (
        (tmp_path, "is a folder"), ("/dev/zero", "no ordinary file"), (link, "dangling"), ("x" * 5000, "xxx.*does not exist"),
        ("a\0b", "does not exist"), ("ftp://host/a.png", "http, https or file"), ("data:image/png;base64,AAAA", "http, https or file"),
        ("file://host/a.png", "another machine"), (io.StringIO("text"), "rb"), (3, "is a int"), (None, "NoneType"),
    ):  # fmt: skip
        with pytest.raises((DamagedFile, OSError), match=words):
            open_picture(source)
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    (tmp_path / "large.png").write_bytes(saved(noise(), "PNG"))
    for source in (tmp_path / "large.png", open(tmp_path / "large.png", "rb")):  # noqa: SIM115
        with pytest.raises(DamagedFile, match="larger than"):
            open_picture(source)


class Server(BaseHTTPRequestHandler):
    picture = saved(noise(), "PNG")

    def do_GET(self):
        if self.path == "/gone.png":
            self.send_error(404)
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.picture)))
            self.end_headers()
            self.wfile.write(self.picture[: len(self.picture) // 2 if "cut" in self.path else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def address(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(addresses, "PAUSES", (0.0,))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(address, tmp_path, monkeypatch):
    assert pixels(open_picture(f"{address}/a.png?size=1")) == pixels(noise())
    assert pixels(open_picture(f"{address}/to/{address}/a.png")) == pixels(noise())
    secret = tmp_path / "secret.png"
    secret.write_bytes(Server.picture)
    for path, words in (
        ("gone.png", "404"), ("cut.png", "of"), (f"to/{secret.as_uri()}", "not allowed"), ("to/ftp://localhost/x", "ftp"),
    ):  # fmt: skip
        with pytest.raises(DamagedFile, match=rf"images\[0\].*{words}"):
            open_picture(f"{address}/{path}", "images[0]")
    with pytest.raises(DamagedFile, match="cannot be downloaded"):
        open_picture("http://127.0.0.1:1/a.png")
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    with pytest.raises(DamagedFile, match="larger than"):
        open_picture(f"{address}/a.png")


def test_the_decoded_picture_keeps_its_mode():
    data = saved(Image.new("1", (3, 2), 1), "PNG")
    assert decode_picture(data).mode == "1" and as_rgb(decode_picture(data)).size == (3, 2)


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\nxx", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_png_without_its_beginning_is_said_in_words(data):
    with pytest.raises(DamagedFile, match="its beginning is cut or damaged"):
        open_picture(data)
