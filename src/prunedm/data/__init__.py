"""Images wherever they are: folders, tables, the hub, arrays. This file imports nothing heavy."""
