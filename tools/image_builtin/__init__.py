"""Builds the embedded image default: the pipeline, CLIP and recogniser of molecli/builtin, from named pictures.

python -m tools.image_builtin all --data-dir FOLDER --work /tmp/work --export out   # what is shipped, on a GPU
python -m tools.image_builtin all --data-dir FOLDER --work /tmp/work --smoke        # every step of it, briefly

Files: `data` (the pictures), `captions` (the language), `scenes` (the drawing), `tokenizer`, `models` (the shapes), one
file for each stage (`vae`, `clip`, `recogniser`, `unet`, `judge`, `concepts`), and `driver`, which runs the stages.
"""
