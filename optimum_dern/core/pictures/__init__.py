"""Pictures of a layer for the report; nothing here decides anything."""
