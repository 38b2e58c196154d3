"""The meter: reserve, let the application answer, settle. It does not know any concrete store."""
