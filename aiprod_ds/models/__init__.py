"""Networks as the trainers know them: built by name, wrapped into one module, with adapters or without.

Read `registry.py` first, then `video_vae.py` (what a VAE must offer); `families/` has the transformers.
Called by trainers, codec, encoding and conversions.
Not here: architectures, which diffusers keeps; losses; whole weights in other forms (`aiprod_ds.convert`).
"""
