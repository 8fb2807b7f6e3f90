"""Each task alone and all together on the same budget: who is hurt by sharing an encoder, and who is helped."""
