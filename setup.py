"""Build of the Cython extension; everything else is in pyproject.toml."""
from setuptools import Extension, setup
setup(ext_modules=[Extension("incckpt._delta", ["incckpt/_delta.pyx"], depends=["incckpt/_kernels.h"])])
