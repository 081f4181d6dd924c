"""The Cython extensions; everything else is in pyproject.toml.

OpenMP is used where a tiny program compiles and links with it; ``INCCKPT_NO_OPENMP=1`` builds without. The C macro
``INCCKPT_GENERIC_ONLY`` leaves out what is for one kind of processor.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# Compile and link arguments, the first pair that works is taken: GCC and Clang; Apple's Clang with libomp installed.
OPENMP = [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]
PROGRAM = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "freethreading_compatible": True,
}


class BuildExtensions(build_ext):
    """``build_ext`` that adds the OpenMP flags which this compiler takes."""

    def build_extensions(self) -> None:
        """Build all extensions, saying which of them get threads."""
        compile_args, link_args = self.openmp_flags()
        print(f"OpenMP: {' '.join(compile_args) or 'none, the kernels run on one thread'}")
        for extension in self.extensions:
            extension.extra_compile_args += compile_args
            extension.extra_link_args += link_args
        super().build_extensions()

    def openmp_flags(self) -> tuple[list[str], list[str]]:
        """Return the first compile and link arguments with which an OpenMP program builds, or none."""
        if os.environ.get("INCCKPT_NO_OPENMP", "0") not in ("", "0"):
            return [], []
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(PROGRAM)
            for compile_args, link_args in OPENMP:
                try:
                    objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=compile_args)
                    self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=link_args)
                except (CompileError, LinkError):
                    continue
                return compile_args, link_args
        return [], []


def extension(name: str, *headers: str) -> Extension:
    """Return the extension built from ``incckpt/<name>.pyx`` and the headers beside it that it includes."""
    folder = f"incckpt/{name.rpartition('/')[0]}"
    return Extension(
        f"incckpt.{name.replace('/', '.')}",
        [f"incckpt/{name}.pyx"],
        include_dirs=[folder],
        depends=[f"{folder}/{header}" for header in headers],
        extra_compile_args=["-O3"],
    )


EXTENSIONS = [
    extension("staging/_detect", "_detect.h", "_sums.h"),
    extension("codec/_planes", "_frames.h", "_planes.h", "huffman/_huffman.h", "huffman/_unhuffman.h"),
    extension("codec/_sha256", "_sha256.h"),
    extension("backends/_files"),
    extension("state/_packing"),
]

setup(
    ext_modules=cythonize(EXTENSIONS, build_dir="build/cython", compiler_directives=DIRECTIVES),
    cmdclass={"build_ext": BuildExtensions},
)
