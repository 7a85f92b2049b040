"""The errors that BranchyNet raises on purpose.

BranchyNetError
├── InputError        an argument, shape, dtype or count is wrong           (also ValueError)
│   └── RunError      a runtime fails with the inputs of a call
├── GraphError        a network cannot be tapped, exported or cut           (also ValueError)
├── FileError         a file is missing, truncated, foreign or unwritable   (also OSError)
├── DataError         a data set is missing or its files are malformed      (also ValueError)
├── VerificationError a file's stored answers are not reproduced here       (also RuntimeError)
├── InfeasibleError   no thresholds meet the constraint                     (also ValueError)
├── MissingExtraError an optional dependency is not installed               (also ImportError)
└── VersionError      a package is installed in a version known to be wrong (also ImportError)

Every message names the offending thing, its value, and what to do about it.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class BranchyNetError(Exception):
    """Base class: catch this to catch every error that BranchyNet raises on purpose."""


class InputError(BranchyNetError, ValueError):
    """An argument has the wrong value, shape, dtype or count."""


class RunError(InputError):
    """A runtime fails with the inputs of a call, such as an index beyond an embedding table."""


class GraphError(BranchyNetError, ValueError):
    """A network cannot be tapped, exported or cut into stages."""


class FileError(BranchyNetError, OSError):
    """A file is missing, truncated, foreign, or could not be written."""


class DataError(BranchyNetError, ValueError):
    """A data set is missing or its files are malformed."""


class VerificationError(BranchyNetError, RuntimeError):
    """The answers of this machine, runtime or provider differ from those stored in an exported file."""


class InfeasibleError(BranchyNetError, ValueError):
    """No choice of thresholds meets the constraint."""


class MissingExtraError(BranchyNetError, ImportError):
    """An optional dependency is not installed."""


class VersionError(BranchyNetError, ImportError):
    """A package is installed in a version that is known to be wrong."""


def counted(number: int, thing: str) -> str:
    """Return a number with its noun: ``1 epoch``, ``2 epochs``."""
    return f"{number} {thing}{'s' * (number != 1)}"


def printable(text: str) -> str:
    """Return `text` with hexadecimal escapes for control characters and for bytes that are not valid UTF-8.

    Names of files and classes may contain both. Terminals obey control characters, and invalid bytes cannot be written.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python keeps an undecodable byte
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """Return the start of an error's message, at most 300 characters; the name of its class if it has no message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint such as ``"; did you mean 'conv1'?"``, or the known names if none is similar."""
    known = [n for n in names if n]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(repr(n) for n in known[:12]) + (", …" if len(known) > 12 else "")
    return f"; known names: {shown}"


@contextlib.contextmanager
def as_graph_errors() -> Iterator[None]:
    """Convert errors in the block to `GraphError`, for graphs that this library has just written.

    The cause is then the network, not a file. Other errors of this library, and errors of the disk, are not converted.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (BranchyNetError, OSError, MemoryError)) and not isinstance(error, (FileError, RunError)):
            raise
        cause = first_line(error.__cause__ or error)  # the runtime's message
        raise GraphError(
            f"the graph of this network cannot be run ({cause}); write that operation in another way (in half "
            "precision, try net.float()), or use TorchEngine, which needs no file"
        ) from error
