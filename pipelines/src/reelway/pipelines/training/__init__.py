"""From feature rows to trained models: rows, the loop, calibration, export. Only ``ray_train`` knows Ray."""
