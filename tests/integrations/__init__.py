"""Tests of the adapters for training frameworks: run by `make frameworks`, skipped where the framework is missing."""
