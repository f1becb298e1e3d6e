"""The schema, and composing a config from groups and overrides."""

from picotrain.config.compose import compose as compose
from picotrain.config.compose import data_preset as data_preset
from picotrain.config.identity import classify_change as classify_change
from picotrain.config.identity import diff as diff
from picotrain.config.identity import experiment_hash as experiment_hash
from picotrain.config.identity import flatten as flatten
from picotrain.config.identity import run_name as run_name
from picotrain.config.saved import dump as dump
from picotrain.config.saved import load as load
from picotrain.config.schema import Config as Config
from picotrain.config.validate import with_values as with_values
