"""An OpenID Connect provider beside API keys: its access tokens at the API, its people at the pages.

What imports PyJWT, the extra `oidc`, is imported where a provider is set only."""

START = "/login/oidc"  # where the pages send a browser on its way to the provider
METADATA = "/.well-known/oauth-protected-resource"
CALLBACK = "/login/oidc/callback"  # where the provider sends it back to
