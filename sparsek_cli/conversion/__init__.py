"""Conversion: plan -> calibrate -> write -> verify."""
