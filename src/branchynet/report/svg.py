"""Matplotlib figures as inline SVG, with the colors of the page and tooltips, without addresses."""

import io
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from ..report import plots

_COLORS = {
    plots.INK: "var(--ink)",
    plots.MUTED: "var(--muted)",
    plots.RULE: "var(--rule)",
    plots.RIGHT: "var(--right)",
    plots.WRONG: "var(--wrong)",
    plots.CHOSEN: "var(--chosen)",
}


def inline(figure: Figure, name: str, description: str) -> str:
    """Return the ``<svg>`` element of a figure; `name` is the prefix of its ids, so that figures can share a page."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        for child in list(element):
            # Metadata contains addresses, and a style would apply to the whole page.
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
        tip = element.attrib.get("id", "")
        if tip.startswith("tip:"):
            del element.attrib["id"]
            _add_tips(element, tip.removeprefix("tip:").split("|"))
        element.attrib = {_local(key): _rewritten(_local(key), value, name) for key, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _add_tips(group: ElementTree.Element, tips: list[str]) -> None:
    """Add one tooltip to the group, or one to each point in it."""
    points = [element for element in group.iter() if _local(element.tag) == "use"]
    for element, tip in zip(points if len(tips) > 1 else [group], tips, strict=True):
        ElementTree.SubElement(element, "title").text = tip


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for color, variable in _COLORS.items():
            value = value.replace(color, variable)
    return value


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
