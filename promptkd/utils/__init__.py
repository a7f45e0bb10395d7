"""Helpers that know nothing about models: files, text formatting."""
