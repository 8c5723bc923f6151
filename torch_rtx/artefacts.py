"""The stages of kernels as text files: each stage is written under its name, and can be read back in its place.

A file is called `NNN_OP.TARGET.STAGE`, e.g. `003_linear_gelu_ab12.sm_89.ptx`. NNN counts the kernels in the order in
which they are first written. Between TARGET and STAGE stands what tells kernels of one op apart: the rank of the
tactic, if it is not the first (`rank2`), and `generic` for code that accepts any sizes where other code needs multiples
of 16. A file in the folder of overrides has the same name; its number is ignored, and may be missing.

    region    the operations of the kernel, in the text form of the IR; has no TARGET
    kir       the same in the kernel IR: what each element is; has no TARGET
    py        Triton source
    ttir      Triton's IR before target-specific lowering
    ptx       PTX, as ptxas gets it
    sass      the disassembled cubin
    ranking   the tactics in the order in which they are tried, with expected and measured times
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch_rtx.errors import KernelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artefacts:
    """The files of one kernel, or of all kernels while `name` is empty. Without folders, nothing is written or read.

    Attributes:
        dump: folder that stages are written to.
        override: folder that stages are read from.
        name: what stands between the number and the stage in the names of files.
    """

    dump: str | None = None
    override: str | None = None
    name: str = ""

    @staticmethod
    def at(dump: str | os.PathLike[str] | None, override: str | None) -> Artefacts:
        """The files of all kernels of a graph, or of the just-in-time compiler.

        Args:
            dump: a folder of which the folder `kernels` gets them.
        """
        kernels = None if dump is None else os.path.abspath(os.path.join(dump, "kernels"))
        return Artefacts(kernels, None if override is None else os.path.abspath(override))

    def __bool__(self) -> bool:
        return self.dump is not None or self.override is not None

    def of(self, *parts: object) -> Artefacts:
        """The files whose names go on with `parts`; empty parts are left out."""
        return replace(self, name=".".join(filter(None, (self.name, *map(str, parts)))))

    def write(self, stage: str, text: str, append: bool = False) -> None:
        """Write the text of a stage, or add to it, if there is a folder for it."""
        if self.dump is not None:
            folder = Path(self.dump)
            folder.mkdir(parents=True, exist_ok=True)
            number = _number(folder, self.name.partition(".")[0])
            with (folder / f"{number:03}_{self.name}.{stage}").open("a" if append else "w") as file:
                file.write(text)

    def read(self, stage: str) -> str | None:
        """The text that takes the place of a stage; None: there is none. Each use is logged as a warning.

        Raises:
            KernelError: the file can't be read, or two files have this name.
        """
        if self.override is None:
            return None
        wanted = re.compile(rf"(\d+_)?{re.escape(f'{self.name}.{stage}')}")
        try:
            found = sorted(path for path in Path(self.override).iterdir() if wanted.fullmatch(path.name))
            if len(found) > 1:
                raise KernelError(f"both {found[0]} and {found[1].name} override the stage {stage} of {self.name}")
            text = found[0].read_text() if found else None
        except (OSError, UnicodeDecodeError) as error:
            raise KernelError(f"an override of {self.name} can't be read: {error}") from None
        if text is not None:
            log.warning("the stage %s of the kernel %s is taken from %s", stage, self.name, found[0])
        return text


NO_FILES = Artefacts()


@lru_cache(maxsize=4096)  # a portable engine has thousands of files
def _number(folder: Path, op: str) -> int:
    """The number of the files of `op`, or the next one. The caller writes such a file at once."""
    numbered = [match for path in folder.iterdir() if (match := re.match(r"(\d+)_([^.]*)\.", path.name))]
    own = [int(match[1]) for match in numbered if match[2] == op]
    return own[0] if own else max((int(match[1]) for match in numbered), default=-1) + 1
