from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from mae_core.data.decode import UnfitImage, UnreadableImage, read_image
from tests.unit.core_fixtures import picture


def numbers(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Random pixels over the whole range of the type."""
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1000, shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype=np.dtype(dtype).newbyteorder("="), endpoint=True).astype(
        dtype
    )


def read_array(path: Path, in_chans: int) -> np.ndarray:
    pixels = read_image(path, in_chans)
    assert isinstance(pixels, np.ndarray)
    return pixels


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB")])
def test_images_of_8_bits_become_grey_or_colour(tmp_path: Path, in_chans: int, mode: str) -> None:
    pictures = {"a.png": picture(0, mode="L"), "b.png": picture(0, mode="RGBA"), "c.gif": picture(0).convert("P"), "d.tif": picture(0)}
    pictures |= {"e.jpg": picture(0).convert("CMYK"), "f.tif": picture(0, mode="RGBA"), "g.tif": picture(0).convert("1")}
    for name, image in pictures.items():
        image.save(tmp_path / name)
        found = read_image(tmp_path / name, in_chans)
        assert isinstance(found, Image.Image)
        with Image.open(tmp_path / name) as saved:
            assert found.mode == mode
            assert np.array_equal(np.asarray(found), np.asarray(saved.convert(mode)))


def test_an_array_of_8_bits_becomes_an_image(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asarray(picture(0)))
    assert read_image(tmp_path / "a.npy", 3) == picture(0)
    assert read_image(tmp_path / "a.npy", 1) == picture(0).convert("L")


@pytest.mark.parametrize(("in_chans", "mode"), [(2, "LA"), (4, "RGBA")])
def test_alpha_is_a_channel_where_the_model_has_it(tmp_path: Path, in_chans: int, mode: str) -> None:
    image = picture(0, mode="RGBA").convert(mode)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_array(tmp_path / "a.png", in_chans), np.asarray(image))


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = picture(0).quantize(16)
    image.save(tmp_path / "a.png", transparency=3)
    alpha = read_array(tmp_path / "a.png", 4)[:, :, 3]
    assert np.array_equal(alpha == 0, np.asarray(image) == 3)


@pytest.mark.parametrize(("saved", "wanted"), [(1, 1), (2, 2), (3, 3), (4, 4), (1, 3), (4, 3), (2, 1), (2, 3)])
def test_png_of_16_bits(tmp_path: Path, saved: int, wanted: int) -> None:
    pixels = numbers((6, 8, saved), np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    found = read_array(tmp_path / "a.png", wanted)
    assert found.dtype == np.uint16
    expected = {(1, 3): [0, 0, 0], (4, 3): [0, 1, 2], (2, 1): [0], (2, 3): [0, 0, 0]}.get((saved, wanted), list(range(saved)))
    assert np.array_equal(found, pixels[:, :, expected])


@pytest.mark.parametrize("dtype", [">u2", "<u2", "uint8", "float32", "float16", "float64", "int16"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((6, 8), {}, id="plane"),
        pytest.param((6, 8, 3), {"photometric": "rgb"}, id="colour"),
        pytest.param((6, 8, 5), {"photometric": "minisblack", "planarconfig": "contig"}, id="interleaved"),
        pytest.param((5, 6, 8), {"photometric": "minisblack", "planarconfig": "separate"}, id="planar"),
        pytest.param((5, 6, 8), {"photometric": "minisblack", "metadata": None}, id="pages"),
        pytest.param((6, 8, 5), {"photometric": "minisblack"}, id="as-tifffile-takes-it"),
        pytest.param((5, 6, 8), {"photometric": "minisblack", "metadata": {"axes": "CYX"}}, id="said-channels-first"),
        pytest.param((1, 6, 8), {}, id="one-plane"),
        pytest.param((6, 8, 7), {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}, id="compressed"),
    ],
)
def test_tiff_of_any_layout(tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any], dtype: str) -> None:
    pixels = numbers(shape, dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=">" if dtype[0] == ">" else "<", **options)
    pixels_HWC = pixels[:, :, None] if pixels.ndim == 2 else pixels if shape[:2] == (6, 8) else np.moveaxis(pixels, 0, -1)
    found = np.atleast_3d(np.asarray(read_image(tmp_path / "a.tif", pixels_HWC.shape[2])))
    assert found.dtype == {"u": np.dtype(f"uint{8 * pixels.dtype.itemsize}")}.get(pixels.dtype.kind, np.float32)
    assert np.array_equal(found, pixels_HWC.astype(found.dtype))


def test_tiff_written_by_microscopes(tmp_path: Path) -> None:
    pixels = numbers((5, 6, 8), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "b.ome.tif", pixels, ome=True, metadata={"axes": "CYX"})
    for name in ("a.tif", "b.ome.tif"):
        assert np.array_equal(read_array(tmp_path / name, 5), np.moveaxis(pixels, 0, -1))


def test_tiff_where_0_is_white(tmp_path: Path) -> None:
    pixels = numbers((6, 8), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert np.array_equal(read_array(tmp_path / "a.tif", 1)[:, :, 0], 65535 - pixels)


def test_several_images_in_a_tiff(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", numbers((2, 6, 8, 3), np.uint8), photometric="rgb")
    with pytest.raises(UnfitImage, match=r"a\.tif: its axes .*\(2, 6, 8, 3\).*save every image as a file of its own"):
        read_image(tmp_path / "a.tif", 3)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_pages_are_channels_only_where_they_are_as_many(tmp_path: Path, in_chans: int) -> None:
    pages = numbers((5, 6, 8), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack", metadata=None)
    assert np.array_equal(read_array(tmp_path / "a.tif", 5), np.moveaxis(pages, 0, -1))
    with pytest.raises(UnfitImage, match=r"a\.tif: its axes IYX of \(5, 6, 8\) .*save every image as a file of its own"):
        read_image(tmp_path / "a.tif", in_chans)


@pytest.mark.parametrize("axis", ["T", "Z"])
def test_times_and_depths_are_no_channels(tmp_path: Path, axis: str) -> None:
    """As many as the model has channels, and still images of their own."""
    tifffile.imwrite(tmp_path / "a.tif", numbers((3, 6, 8), np.uint16), imagej=True, metadata={"axes": f"{axis}YX"})
    with pytest.raises(UnfitImage, match=rf"a\.tif: its axes {axis}YX of \(3, 6, 8\) .*save every image as a file of its own"):
        read_image(tmp_path / "a.tif", 3)


@pytest.mark.parametrize(
    ("shape", "in_chans", "first"),
    [
        ((6, 8), 1, False),
        ((6, 8, 5), 5, False),
        ((5, 6, 8), 5, True),
        ((5, 8, 5), 5, False),  # both could be: channels last, as documented
        ((3, 8, 3), 3, False),
    ],
)
def test_npy(tmp_path: Path, shape: tuple[int, ...], in_chans: int, first: bool) -> None:
    pixels = numbers(shape, np.float32)
    np.save(tmp_path / "a.npy", pixels)
    expected = np.moveaxis(pixels, 0, -1) if first else pixels.reshape(*shape[:2], -1)
    assert np.array_equal(read_array(tmp_path / "a.npy", in_chans), expected)


@pytest.mark.parametrize(("shape", "in_chans"), [((3, 40, 50), 1), ((1, 40, 50), 3), ((4, 40, 50), 3)])
def test_npy_of_usual_channels_first_is_read_as_if_they_were_last(tmp_path: Path, shape: tuple[int, ...], in_chans: int) -> None:
    pixels = numbers(shape, np.uint8)
    np.save(tmp_path / "first.npy", pixels)
    np.save(tmp_path / "last.npy", np.moveaxis(pixels, 0, -1))
    if shape[0] == 4:
        with pytest.raises(UnfitImage, match=r"4 channel\(s\) \(uint8 of \(40, 50, 4\)\), but model\.in_chans is 3"):
            read_image(tmp_path / "first.npy", in_chans)
    else:
        found = read_image(tmp_path / "first.npy", in_chans)
        assert isinstance(found, Image.Image)
        assert found.size == (50, 40)
        assert found == read_image(tmp_path / "last.npy", in_chans)


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint32", "int64", "complex64", "U1", "datetime64[s]"])
def test_types_that_float32_does_not_hold_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((6, 8), dtype=dtype))
    with pytest.raises(UnfitImage, match=r"a\.npy: its pixels are .*; save them as uint8, uint16 or float32"):
        read_image(tmp_path / "a.npy", 1)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match=r"a\.npy: .*allow_pickle"):
        read_image(tmp_path / "a.npy", 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_pixels_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    pixels = numbers((6, 8), np.float64)
    pixels[3, 4] = value
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(UnreadableImage, match=r"a\.npy: it has NaN or infinite pixels"):
        read_image(tmp_path / "a.npy", 1)


@pytest.mark.parametrize(
    ("shape", "in_chans"), [((6, 8, 3), 1), ((6, 8, 4), 3), ((6, 8, 2), 1), ((6, 8), 2), ((0, 8, 3), 3), ((2, 6, 8, 3), 3)]
)
def test_arrays_that_are_no_image_of_the_model(tmp_path: Path, shape: tuple[int, ...], in_chans: int) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype=np.uint16))
    with pytest.raises(UnfitImage, match=rf"a\.npy: .*\({', '.join(map(str, shape))}"):
        read_image(tmp_path / "a.npy", in_chans)


@pytest.mark.parametrize(("mode", "in_chans", "found"), [("RGB", 5, 3), ("L", 2, 1), ("RGBA", 5, 4), ("RGB", 4, 3)])
def test_another_number_of_channels(tmp_path: Path, mode: str, in_chans: int, found: int) -> None:
    picture(0, mode=mode).save(tmp_path / "a.png")
    with pytest.raises(
        UnfitImage, match=rf"a\.png: {found} channel\(s\) \({mode}\).*in_chans is {in_chans}; set model.in_chans to {found}, or"
    ):
        read_image(tmp_path / "a.png", in_chans)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path: Path, orientation: int) -> None:
    image, exif = picture(0, width=16, height=8), Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(_with_exif(image, exif))
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png", 3) == upright.convert("RGB")
    image.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    assert read_image(tmp_path / "a.jpg", 3).size == upright.size
    image.convert("CMYK").save(tmp_path / "c.tif", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "c.tif", 3)), np.asarray(upright.convert("CMYK").convert("RGB")))
    expected = np.asarray(upright).astype(np.uint16) * 257
    pixels = np.asarray(image).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=[(0x0112, 3, 1, orientation, True)])
    assert np.array_equal(read_array(tmp_path / "a.tif", 3), expected)
    (tmp_path / "b.png").write_bytes(_with_exif_chunk(imagecodecs.png_encode(pixels), exif.tobytes()))
    assert np.array_equal(read_array(tmp_path / "b.png", 3), expected)


def _with_exif(image: Image.Image, exif: Image.Exif) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return Image.open(buffer)


def _with_exif_chunk(png: bytes, exif: bytes) -> bytes:
    """The chunk put behind the header, which is 8 + 25 bytes long."""
    import zlib

    body = b"eXIf" + exif.removeprefix(b"Exif\0\0")
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return png[:33] + chunk + png[33:]


def test_the_content_says_the_format(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers((6, 8), np.float32))
    (tmp_path / "a.npy").rename(tmp_path / "a.png")
    assert read_array(tmp_path / "a.png", 1).dtype == np.float32


def test_a_png_is_read_bit_for_bit(tmp_path: Path) -> None:
    picture(5).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 3) == picture(5)


def encoded(kind: str) -> bytes:
    buffer = BytesIO()
    pixels = numbers((64, 64, 3), np.uint16)
    if kind == "tiff":
        tifffile.imwrite(buffer, pixels, photometric="rgb", compression="zlib")
    elif kind == "plain-tiff":
        tifffile.imwrite(buffer, pixels, photometric="rgb")
    elif kind == "png-16":
        buffer.write(imagecodecs.png_encode(pixels))
    elif kind == "npy":
        np.save(buffer, pixels)
    else:
        picture(0, width=64, height=64).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "tiff", "plain-tiff", "png-16", "npy"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_half_a_file_is_unreadable(tmp_path: Path, kind: str, share: float) -> None:
    content = encoded(kind)
    (tmp_path / "bad.png").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UnreadableImage, match=rf"{tmp_path}/bad\.png: \w"):
        read_image(tmp_path / "bad.png", 3)


@pytest.mark.parametrize("content", [b"no image", b"", b"\x93NUMPY", b"II*\0", b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x10"])
def test_what_is_no_image_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"{tmp_path}/bad\.png: \w"):
        read_image(tmp_path / "bad.png", 3)


def test_an_array_larger_than_its_file_is_not_made(tmp_path: Path) -> None:
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 20, 3)})
    (tmp_path / "bad.npy").write_bytes(header.getvalue() + b"few")
    with pytest.raises(UnreadableImage, match=r"bad\.npy: \w"):
        read_image(tmp_path / "bad.npy", 3)
