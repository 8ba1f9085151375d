"""Decoding images of any mode."""

import io

import numpy as np
import pytest
from PIL import Image

from modeling.data import decoding


def ramp(height=24, width=16):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 10, x * 15, (x + y) * 6], axis=2).astype(np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def test_any_mode_becomes_rgb_uint8():
    rgb = Image.fromarray(ramp())
    cases = {
        "L": encoded(rgb.convert("L")),
        "1": encoded(rgb.convert("1")),
        "P": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE)),
        "RGBA": encoded(rgb.convert("RGBA")),
        "LA": encoded(rgb.convert("LA")),
        "CMYK": encoded(rgb.convert("CMYK"), "TIFF"),
        "YCbCr": encoded(rgb.convert("YCbCr"), "JPEG", quality=100, subsampling=0),
    }
    for mode, cell in cases.items():
        image = decoding.read_image(cell, "here")
        assert image.mode == "RGB"
        assert image.size == (16, 24)
        reference = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(reference)), mode


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(dtype):
    deep = (np.arange(24 * 16).reshape(24, 16) * 170).astype(dtype)
    cell = encoded(Image.fromarray(deep), "TIFF")
    image = np.asarray(decoding.read_image(cell, "here"))
    assert np.array_equal(image[..., 0], (deep / 257).round().astype(np.uint8))
    assert image[..., 0].max() > 240
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(ramp())
    exif = Image.Exif()
    exif[0x0112] = orientation
    # the stored pixels are the inverse of the transformation that the orientation asks for
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    image = decoding.read_image(encoded(stored, exif=exif), "here")
    assert np.array_equal(np.asarray(image), ramp())


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", encoded(Image.fromarray(ramp()))["bytes"][:-30]],
    ids=["empty", "text", "cut"],
)
def test_an_undecodable_image_is_named(content):
    with pytest.raises(ValueError, match="cannot decode image row 7"):
        decoding.read_image({"bytes": content, "path": None}, "row 7")


def test_a_panorama_is_reduced_by_its_long_side():
    assert decoding.reduced(Image.new("RGB", (10000, 10)), 256).size == (768, 1)
    assert decoding.reduced(Image.new("RGB", (700, 100)), 256).size == (700, 100)
