"""LLaMA-Factory imports torchaudio, of which there is no build for a torch without CUDA among Python's packages."""
