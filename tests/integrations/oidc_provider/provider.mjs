// A certified OpenID Provider for the tests. Its one argument is JSON: where it listens, its private keys, its clients
// (`claims`: of the tokens that a client gets for itself), and its people by the name that they log in with.
import Provider from 'oidc-provider';

const { issuer, port, audience, jwks, clients, people } = JSON.parse(process.argv[2]);
const claimsOf = Object.fromEntries(clients.map(({ metadata, claims }) => [metadata.client_id, claims]));
const ofPages = new Set(clients.filter(({ pages }) => pages).map(({ metadata }) => metadata.client_id));

const provider = new Provider(issuer, {
  jwks,
  clients: clients.map(({ metadata }) => metadata),
  cookies: { keys: ['of a test'] },
  pkce: { required: () => true },
  claims: { openid: ['sub', 'tenant', 'roles'], profile: ['preferred_username'], email: ['email'] },
  findAccount: (_ctx, id) => ({ accountId: id, claims: () => ({ sub: id, ...people[id] }) }),
  extraTokenClaims: (_ctx, token) => (token.accountId ? people[token.accountId] : claimsOf[token.clientId]),
  ttl: { Interaction: 600, Session: 600, Grant: 600, IdToken: 600, DeviceCode: 600, RefreshToken: 600 },
  features: {
    clientCredentials: { enabled: true },
    deviceFlow: { enabled: true },
    resourceIndicators: {
      enabled: true,
      // What the pages get is for the provider's own userinfo.
      defaultResource: (_ctx, client) => (ofPages.has(client.clientId) ? undefined : audience),
      useGrantedResource: () => true,
      getResourceServerInfo: (_ctx, resource) => ({
        scope: '',
        audience: resource,
        accessTokenFormat: 'jwt',
        accessTokenTTL: 600,
        jwt: { sign: { alg: 'ES256' } },
      }),
    },
  },
});
provider.on('server_error', (_ctx, error) => console.error(error));
provider.listen(port, '127.0.0.1');
