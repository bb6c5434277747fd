"use strict";
// Upload by drag and drop, with progress. Several files (an .onnx and its weights beside it, as PyTorch writes it) go as
// one .tar, made here of the files as they are.
(() => {
  const token = document.querySelector("meta[name=csrf-token]").content;
  const size = (n) => (n < 1e6 ? `${Math.ceil(n / 1e3)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`);

  // A header of POSIX ustar: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html
  const header = (file) => {
    const name = new TextEncoder().encode(file.name);
    if (name.length > 100) throw new Error(`The name of ${file.name} is too long: at most 100 bytes.`);
    const block = new Uint8Array(512);
    const put = (text, at) => block.set(new TextEncoder().encode(text), at);
    block.set(name, 0);
    put("0000644\0", 100);
    put("0000000\0", 108);
    put("0000000\0", 116);
    if (file.size >= 2 ** 33) {
      block[124] = 0x80; // base 256, for what eleven octal digits cannot say
      new DataView(block.buffer).setBigUint64(128, BigInt(file.size));
    } else {
      put(file.size.toString(8).padStart(11, "0") + "\0", 124);
    }
    put("00000000000\0", 136);
    put("        0", 148);
    put("ustar\0" + "00", 257);
    const sum = block.reduce((total, byte) => total + byte, 0);
    put(sum.toString(8).padStart(6, "0") + "\0 ", 148);
    return block;
  };
  const tar = (files) => {
    const parts = [];
    for (const file of files) parts.push(header(file), file, new Uint8Array((512 - (file.size % 512)) % 512));
    parts.push(new Uint8Array(1024));
    return new Blob(parts);
  };

  const send = (form, files) => {
    const told = form.querySelector(".told");
    const bar = form.querySelector("progress");
    const fail = (text) => {
      bar.hidden = true;
      told.className = "told no";
      told.textContent = text;
    };
    let body = files[0];
    let filename = files[0].name;
    try {
      if (files.length > 1) {
        const main = files.find((file) => file.name.endsWith(".onnx")) || files[0];
        body = tar(files);
        filename = main.name.replace(/\.[^.]*$/, "") + ".tar";
      }
    } catch (error) {
      return fail(error.message);
    }
    const request = new XMLHttpRequest();
    request.open("POST", `${form.dataset.upload}?${new URLSearchParams({ filename })}`);
    request.setRequestHeader("X-CSRF-Token", token);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    bar.hidden = false;
    told.className = "told";
    request.upload.addEventListener("progress", (event) => {
      bar.value = event.total ? event.loaded / event.total : 0;
      told.textContent = event.loaded < event.total ? `${size(event.loaded)} of ${size(event.total)}` : "Sent; it is being looked at …";
    });
    request.addEventListener("error", () => fail("The connection was lost. Nothing was kept; send it again."));
    request.addEventListener("load", () => {
      let answer = {};
      try {
        answer = JSON.parse(request.responseText);
      } catch {
        answer = { detail: `The service answered ${request.status}.` };
      }
      if (request.status !== 201) return fail([answer.detail, answer.remedy].filter(Boolean).join(" "));
      told.textContent = `${answer.name} is there.`;
      took(form.dataset.kind, answer);
    });
    request.send(body);
  };

  // On the form of a new job it is chosen there; elsewhere, the way goes on to what comes next.
  const took = (kind, answer) => {
    const ids = kind === "models" ? ["model"] : ["calibration", "validation"];
    const selects = ids.map((id) => document.getElementById(id)).filter(Boolean);
    if (!selects.length) {
      location.assign(kind === "models" ? `/jobs/new?model=${answer.id}` : `/datasets/${answer.id}`);
      return;
    }
    for (const select of selects) {
      if (kind === "datasets" && select.value) continue;
      select.add(new Option(`${answer.name} (${answer.id.slice(-6)})`, answer.id, true, true));
    }
    if (kind === "datasets" && selects.every((select) => select.value !== answer.id)) selects.forEach((select) => select.add(new Option(`${answer.name} (${answer.id.slice(-6)})`, answer.id)));
  };

  for (const form of document.querySelectorAll("form.upload")) {
    form.hidden = false;
    const input = form.querySelector("input[type=file]");
    const drop = form.querySelector(".drop");
    input.addEventListener("change", () => input.files.length && send(form, [...input.files]));
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const name of ["dragenter", "dragover"]) form.addEventListener(name, (event) => (event.preventDefault(), drop.classList.add("over")));
    for (const name of ["dragleave", "drop"]) form.addEventListener(name, () => drop.classList.remove("over"));
    form.addEventListener("drop", (event) => {
      event.preventDefault();
      const files = [...event.dataTransfer.files];
      if (files.length) send(form, files);
    });
  }
})();
