"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const at = (id) => document.getElementById(id);
  const samples = [...document.querySelectorAll(".samples button")];
  const running = {}; // what is being asked, by kind: an AbortController each
  let image = null; // the last answer to /image or /sample
  let clean = null; // the first class without attack
  let newest = 0; // of the images asked for
  let timer = 0;

  // --- words -----------------------------------------------------------------------------------------------------
  const percent = (share) => share > 0.9995 ? ">\u00a099.9\u00a0%" : share < 0.0005 ? "<\u00a00.1\u00a0%" : `${(100 * share).toFixed(1)}\u00a0%`;
  const number = (value) => value === 0 ? "0" : String(Number(value.toPrecision(3)));
  const below = (value) => (Math.floor(value * 1000) / 1000).toFixed(3); // what is guaranteed is never rounded up
  const count = (value) => value.toLocaleString("en-GB");
  const radius = (norm, tick) => {
    const value = facts.grid[norm] * tick, pixels = value * 255;
    const whole = norm === "linf" && tick > 0 && Math.abs(pixels - Math.round(pixels)) < 1e-6;
    return whole ? `${Math.round(pixels)}/255 = ${number(value)}` : number(value);
  };
  const name = (norm) => ({linf: "L∞", l2: "L2", l1: "L1"})[norm];
  const norm = () => at("norm").value;
  const tick = () => Number(at("eps").value);

  const say = (words) => { if (at("status").textContent !== words) at("status").textContent = words; };
  const fault = (words) => {
    at("fault").textContent = words || "";
    at("fault").hidden = !words;
    if (words) at("fault").scrollIntoView({block: "nearest"});
  };
  const showRadius = () => {
    const words = `${radius(norm(), tick())} (${name(norm())})`;
    at("eps-words").textContent = words;
    at("eps").setAttribute("aria-valuetext", words);
  };

  // --- asking ----------------------------------------------------------------------------------------------------
  const post = (path, body, signal) =>
    fetch(path, {method: "POST", body, signal, headers: {"X-Gambeson-Token": facts.token}});

  async function* lines(response) {
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, {stream: true})).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  }

  const gone = (error) => {
    if (error.name !== "AbortError") fault("The server does not answer any more; it was probably ended in the terminal.");
  };

  const forget = (...kinds) => kinds.forEach((kind) => { if (running[kind]) running[kind].abort(); delete running[kind]; });

  async function stream(kind, path, question, show) {
    forget(kind);
    const mine = running[kind] = new AbortController();
    try {
      const response = await post(path, JSON.stringify(question), mine.signal);
      if (!response.ok) {
        document.body.classList.remove("waiting");
        say("");
        return fault((await response.json()).error);
      }
      for await (const line of lines(response)) {
        if (running[kind] !== mine) return;
        if (line.error || line.stopped) { fault(line.error || line.stopped); document.body.classList.remove("waiting"); }
        else show(line);
      }
    } catch (error) { gone(error); }
  }

  async function choose(path, body, pressed) {
    const mine = ++newest;
    fault("");
    try {
      const response = await post(path, body), found = await response.json();
      if (mine !== newest) return;
      if (!response.ok) return fault(found.error);
      image = found;
      clean = null;
      samples.forEach((each, i) => each.setAttribute("aria-pressed", String(i === pressed)));
      showImage();
      attack();
      certify();
    } catch (error) { gone(error); }
  }

  function open(file) {
    if (file.size > facts.bytes) {
      return fault(`Expected a picture of at most ${facts.bytes / 1e6} MB, got ${(file.size / 1e6).toFixed(1)} MB.`);
    }
    choose("/image", file, -1);
  }

  // --- showing ---------------------------------------------------------------------------------------------------
  function showImage() { // nothing that was said of another image stays
    forget("attack", "certificate");
    for (const id of ["attack-words", "difference-words", "smallest", "smallest-words", "certified", "certified-words", "copies-words"]) at(id).textContent = "";
    rows("clean", []);
    rows("fooled", []);
    for (const id of ["figures", "smallest-part", "certified-part"]) at(id).hidden = false;
    at("seen").src = image.seen;
    at("seen").alt = `The ${facts.width} by ${facts.height} pixels that the network is given`;
    const label = image.label === null ? "" : ` Its label says ${image.label}.`;
    at("told").textContent = image.told.join(" ") + label;
    at("attacked").removeAttribute("src");
    at("difference").removeAttribute("src");
    zoom();
    say("Asking the network.");
  }

  function rows(id, classes) {
    at(id).replaceChildren(...classes.map(([label, share]) => {
      const row = document.createElement("tr"), head = document.createElement("th");
      const value = document.createElement("td"), cell = document.createElement("td"), bar = document.createElement("span");
      head.scope = "row";
      head.textContent = label;
      value.textContent = percent(share);
      cell.className = "share";
      cell.setAttribute("aria-hidden", "true");
      bar.className = "bar";
      bar.style.width = `${100 * share}%`;
      cell.append(bar);
      row.append(head, value, cell);
      return row;
    }));
  }

  function showPictures(told) {
    for (const id of ["attacked", "difference"]) at(id).src = told[id];
    at("attacked").alt = "The image that the attack ended with";
    at("difference").alt = told.none ? "Nothing was added" : "What the attack added, magnified: grey where nothing";
    at("difference-words").textContent = told.none
      ? "Nothing: the radius is 0."
      : `Magnified ${number(told.times)} times; grey is no change. Its ${name(norm())} size is ${number(told.distance)}.`;
    document.body.classList.remove("waiting");
  }

  function showAttack(told) {
    const where = `${name(norm())} ε ${radius(norm(), tick())}`;
    if (!told.final) {
      at("attack-words").textContent = `Withstood ${told.steps} of ${told.of} steps so far.`;
      return;
    }
    showPictures(told);
    at("attack-words").classList.toggle("broken", Boolean(told.broken));
    const first = `The network says ${clean[0]} (${percent(clean[1])}).`;
    if (told.none) {
      at("attack-words").textContent = "No attack.";
      rows("fooled", told.classes);
      return say(first);
    }
    rows("fooled", told.classes);
    const [label, share] = told.classes[0];
    if (told.broken) {
      const smaller = told.found_at < told.tick ? ` That is from the smaller radius ${radius(norm(), told.found_at)}.` : "";
      at("attack-words").textContent = `✗ Broken after ${told.steps} of ${told.of} steps.${smaller}`;
      say(`${first} Attacked within ${where}, it says ${label} (${percent(share)}): broken.`);
    } else {
      at("attack-words").textContent = `✓ Withstood ${told.steps} of ${told.of} steps. That proves nothing about other attacks.`;
      say(`${first} Attacked within ${where}, it still says so (${percent(share)}): withstood this attack.`);
    }
  }

  function showSmallest(told) {
    const going = told.final ? "" : "Still searching. ";
    if (told.tick === null) {
      at("smallest").textContent = told.final ? `None up to ${number(told.last)} (${name(norm())})` : "None so far";
      at("smallest-words").textContent = `${going}${told.final ? "This attack broke it at no position of the slider it tried. That proves nothing." : ""}`;
    } else {
      at("smallest").textContent = `${name(norm())} ε ${radius(norm(), told.tick)}`;
      at("smallest-words").textContent = `${going}Position ${told.tick} of the slider, found by halving. The true smallest radius is no larger.`;
    }
  }

  function showCertificate(told) {
    const few = told.final ? "" : ", not yet a certificate";
    at("copies").value = told.copies / told.of;
    at("copies-words").textContent = `${count(told.copies)} of ${count(told.of)}`;
    const votes = `The network gave ${told.candidate} to ${percent(told.share)} of the noisy copies (σ ${number(told.sigma)})`;
    if (told.abstains) {
      at("certified").textContent = `ABSTAIN: radius 0${few}`;
      at("certified-words").textContent = `${votes}; that is not surely more than half, so nothing is certified.`;
    } else {
      at("certified").textContent = `L2 ${below(told.radius)}${few}`;
      const other = clean && clean[0] !== told.candidate ? ` The bare network says ${clean[0]} instead.` : "";
      at("certified-words").textContent = `${votes}, surely to ${(100 * below(told.p_lower)).toFixed(1)}\u00a0% or more. Certified class: ${told.candidate}.${other} More than ${number(told.largest)} cannot be certified with so many copies.`;
    }
    at("hint").textContent = told.hint;
  }

  // --- acting ----------------------------------------------------------------------------------------------------
  function attack() {
    showRadius();
    if (!image) return;
    document.body.classList.add("waiting");
    const asked = {pixels: image.pixels, norm: norm(), tick: tick()};
    stream("attack", "/attack", asked, (line) => {
      if (line.clean) {
        if (!clean) say(`The network says ${line.clean.classes[0][0]} (${percent(line.clean.classes[0][1])}). Attacking.`);
        clean = line.clean.classes[0];
        rows("clean", line.clean.classes);
      }
      if (line.attack) showAttack(line.attack);
      if (line.smallest) showSmallest(line.smallest);
    });
  }

  function certify() {
    const sigma = at("sigma").valueAsNumber;
    if (!image) return;
    forget("certificate");
    for (const id of ["certified", "certified-words", "copies-words"]) at(id).textContent = "";
    if (!(sigma > 0 && sigma <= 10)) return fault("Noise σ: expected a number above 0 and at most 10.");
    at("copies").value = 0;
    at("copies-words").textContent = "";
    at("certified").textContent = "…";
    at("certified-words").textContent = "";
    stream("certificate", "/certify", {pixels: image.pixels, sigma}, (line) => showCertificate(line.certificate));
  }

  function soon(work) {
    clearTimeout(timer);
    timer = setTimeout(() => { fault(""); work(); }, 60);
  }

  function zoom() { // whole screen pixels for each pixel of the image, as far as there is room
    const room = at("seen").closest(".frame").clientWidth;
    const times = Math.max(1, Math.floor(Math.min(room, 352) / facts.width));
    for (const id of ["seen", "attacked", "difference"]) at(id).style.width = `${times * facts.width}px`;
  }

  at("file").addEventListener("change", (event) => { if (event.target.files[0]) open(event.target.files[0]); });
  at("eps").addEventListener("input", () => { forget("attack"); showRadius(); soon(attack); });
  at("norm").addEventListener("change", () => { forget("attack"); showRadius(); soon(attack); });
  at("sigma").addEventListener("change", () => soon(certify));
  samples.forEach((each, i) => each.addEventListener("click", () => choose("/sample", JSON.stringify({index: i}), i)));
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData && event.clipboardData.files[0];
    if (file) { event.preventDefault(); open(file); }
  });
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
    else fault("What was dropped is no file. Save the picture first, then drop its file.");
  });
  window.addEventListener("resize", () => { if (image) zoom(); });

  at("norm").value = facts.norm;
  at("eps").value = facts.tick;
  at("sigma").value = facts.sigma;
  showRadius();
  if (samples.length) choose("/sample", JSON.stringify({index: 0}), 0);
})();
