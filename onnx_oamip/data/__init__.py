"""Calibration and evaluation data: files, folders of images, functions and arrays in memory as checked samples."""
