"""Checkpoints to and from the files of other programs: ``torch.save``, safetensors, Hugging Face, DCP, Lightning."""

from incckpt.interchange.exporting import FORMATS, Exported, Format, export
from incckpt.interchange.importing import Imported, import_files
from incckpt.run.progress import Progress

__all__ = ["FORMATS", "Exported", "Format", "Imported", "Progress", "export", "import_files"]
