"""Algebra that several techniques share (loading modules, calibration passes, solvers). No Technique lives here."""
