"""The meter: reserve, let the application answer, settle. It knows no concrete store."""
