"""Default settings as yaml files, installed as the package ``recbole_rcekd.properties``."""
