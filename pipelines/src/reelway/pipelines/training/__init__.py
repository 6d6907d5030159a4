"""Training: rows, the loop, calibration and export. Only ``ray_train`` imports Ray."""
