"""Data specifications to batches, losses and metrics."""

BUILTIN = {
    "classification": "autopeft.tasks.classification:Classification",
    "diffusion": "autopeft.tasks.diffusion:Diffusion",
}
