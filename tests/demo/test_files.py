import io

import pytest
from PIL import Image

from syncd.demo.clock import SimulatedClock
from syncd.demo.files import FileSpec, identity
from syncd.demo.practice import Practice


@pytest.mark.parametrize(("extension", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("gif", "GIF"), ("tif", "TIFF")])
def test_pictures_are_real_and_deterministic(extension: str, kind: str) -> None:
    spec = FileSpec("p", 1, "document", 5, "1", extension, 9_000)
    with Image.open(io.BytesIO(spec.render())) as picture:
        picture.load()
        assert picture.format == kind
    assert spec.render() == FileSpec("p", 1, "document", 5, "1", extension, 9_000).render()
    assert abs(len(spec.render()) - 9_000) < 1_500


def test_files_end_as_their_formats_end() -> None:
    ends = {"jpg": b"\xff\xd9", "png": b"IEND\xaeB`\x82", "pdf": b"%%EOF\n"}
    for extension, end in ends.items():
        assert FileSpec("p", 1, "document", 5, "1", extension).render().endswith(end)


def test_a_big_file_can_be_asked_for() -> None:
    content = FileSpec("p", 1, "document", 5, "1", "jpg", 3_000_000).render()
    assert abs(len(content) - 3_000_000) < 2_000
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()


def test_thumbnails_are_a_hundred_pixels_wide_and_say_whose_they_are() -> None:
    practice = Practice(SimulatedClock(0.0))
    practice.add_patient()
    doc = practice.add_document(1, "png")
    content = practice.thumbnail(doc)
    assert identity(content) == (1, "thumbnail", doc, "1")
    with Image.open(io.BytesIO(content)) as picture:
        assert (picture.size, picture.format) == ((100, 100), "PNG")
    assert practice.thumbnail(doc, grey=True) != content


def test_thousands_of_files_take_seconds() -> None:
    contents = {FileSpec("p", 1, "document", num, "1", "jpg").render() for num in range(3_000)}
    assert len(contents) == 3_000
