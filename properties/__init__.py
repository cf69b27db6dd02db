"""Default settings as yaml files; a package only so that they are installed as `recbole_rcekd.properties`."""
