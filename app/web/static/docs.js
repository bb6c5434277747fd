"use strict";
const token = document.querySelector("meta[name=csrf-token]").content;
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  requestInterceptor: (request) => {
    if (new URL(request.url, location).origin === location.origin) request.headers["X-CSRF-Token"] = token;
    return request;
  },
});
