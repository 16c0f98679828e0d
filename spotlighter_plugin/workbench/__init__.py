"""The bench on which the plug-in is measured: training, sweeps, reports, speed, pictures, the demo."""
