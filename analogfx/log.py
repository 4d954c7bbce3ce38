"""What analogfx says of its work: ``logging.getLogger("analogfx")``, silent unless asked."""

import logging

logger = logging.getLogger("analogfx")
logger.addHandler(logging.NullHandler())
