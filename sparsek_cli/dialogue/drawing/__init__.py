"""How the next token of a reply is drawn, and the settings that say it."""
