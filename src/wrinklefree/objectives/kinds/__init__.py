"""Objectives, found by name: each file defines `Objective`, a `LanguageObjective` for `training.objective=NAME`."""
