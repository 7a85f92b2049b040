"""The page of a server over HTTP: its files, its headers, the key, and what it reads."""

import re
import urllib.error
import urllib.request
from pathlib import Path

import orjson
import pytest

import branchynet.serve
from branchynet.serve import page
from helpers.html_page import Page
from helpers.served import PRESETS, digits_folder, serving

KEY = "a-key-of-at-least-16-characters"
STATIC = Path(branchynet.serve.__file__).parent / "static"


def get(address, key=None):
    request = urllib.request.Request(address, headers={} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server with a key, whose folder holds a model with a record."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "key.txt").write_text(KEY)
    digits_folder(folder / "models" / "digits", presets=PRESETS)
    with serving(folder / "models", "--api-key-file", str(folder / "key.txt")) as found:
        yield found


def test_the_page_and_its_files_need_no_key_and_forbid_scripts_of_others(address):
    links = set()
    for path in ("/", *(f"/page/{name}" for name in page.assets())):
        status, headers, body = get(address + path)
        assert status == 200, path
        rules = dict(one.split(" ", 1) for one in headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["base-uri"] == "'none'" and rules["script-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        links |= set(re.findall(rb'(?:src|href)="([^"]+)"|from "\./([^"]+)"', body))
    names = {(absolute.removeprefix(b"/page/") or relative).decode() for absolute, relative in links} - {"/docs"}
    assert names == set(page.assets()) - {"index.html"}  # none is missing, and none is not used


def test_no_file_of_the_page_is_long_or_reads_from_elsewhere():
    for path in STATIC.iterdir():
        text = path.read_text()
        assert len(text.splitlines()) <= 350
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), path.name
        outside = set(re.findall(r"https?://[^\"' ]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, path.name


def luminance(color):
    """By WCAG 2.2."""
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_have_the_contrast_of_wcag_aa(scheme):
    block = re.findall(r":root \{(.*?)\}", (STATIC / "style.css").read_text(), flags=re.DOTALL)[scheme]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    pairs = [(text, ground, 4.5) for text in ("ink", "muted", "accent", "bad") for ground in ("panel", "paper")]
    pairs += [("on-accent", "accent", 4.5), ("ink", "soft", 4.5), ("muted", "soft", 4.5)]
    pairs += [("edge", "panel", 3.0), ("edge", "paper", 3.0), ("accent", "panel", 3.0)]  # borders and marks
    for one, other, least in pairs:
        low, high = sorted((luminance(colors[one]), luminance(colors[other])))
        assert (high + 0.05) / (low + 0.05) >= least, (one, other)


def test_every_control_of_the_page_has_a_label():
    found = Page((STATIC / "index.html").read_text().replace("<!doctype html>", ""))
    named = {one["for"] for one in found.all("label") if "for" in one}
    for control in (*found.all("select"), *(one for one in found.all("input") if one["type"] != "file")):
        assert control["id"] in named
    assert not [
        tag for tag, attributes in found.tags if "style" in attributes or any(a.startswith("on") for a in attributes)
    ]


@pytest.mark.parametrize("name", ["..%2Fapp.py", "%2Fetc%2Fpasswd", "none.js", "..%5Capp.py", "app.js%00"])
def test_no_path_reaches_the_file_system(address, name):
    status, _, body = get(f"{address}/page/{name}")
    assert status == 404 and b"import" not in body and b"root" not in body


def test_what_the_page_reads_needs_the_key(address):
    for path in ("/models/digits", "/models/digits/frontier", "/models/digits/traffic"):
        assert get(address + path)[0] == 401
        assert get(address + path, KEY)[0] == 200
    assert get(f"{address}/models/none/frontier", KEY)[0] == 404


def test_the_frontier_is_the_same_each_time(address):
    first, second = (orjson.loads(get(f"{address}/models/digits/frontier", KEY)[2]) for _ in range(2))
    assert first == second and first["presets"].keys() == PRESETS.keys() and len(first["points"]) > 10
