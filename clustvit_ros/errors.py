"""Every exception that this package raises on purpose.

ClustvitError
├── ConfigError        a configuration or parameter value that cannot be used
├── ModelError         a model folder or checkpoint that cannot be loaded
├── ImageError         an image or image message that cannot be segmented
├── DataError          a data set that cannot be trained or evaluated on
├── BagError           a recorded bag that cannot be read or labelled
└── EngineError        a device or execution provider that cannot run the model

Messages say what was wrong, what was got, what was expected, and what to do about it.
"""


class ClustvitError(Exception):
    """Base of all errors of this package."""


class ConfigError(ClustvitError, ValueError):
    """A configuration or parameter value that cannot be used."""


class ModelError(ClustvitError):
    """A model folder or checkpoint that cannot be loaded."""


class ImageError(ClustvitError, ValueError):
    """An image or image message that cannot be segmented."""


class DataError(ClustvitError):
    """A data set that cannot be trained or evaluated on."""


class BagError(ClustvitError):
    """A recorded bag that cannot be read or labelled."""


class EngineError(ClustvitError, RuntimeError):
    """A device or execution provider that cannot run the model."""
