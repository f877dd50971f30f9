"""The OpenAI HTTP front end: translates OpenAI's API to calls of the text service. No policy lives here."""
