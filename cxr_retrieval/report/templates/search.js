(() => {
  "use strict";
  const PAGE = 12;
  const $ = (id) => document.getElementById(id);
  const label = (finding) => finding.replaceAll("_", " ");
  const hitUrl = (id, what) => `/v1/images/${encodeURIComponent(id)}/${what}`;

  let index = null; // GET /v1/index
  let query = null; // {file, bitmap} or {id}; region is [x, y, w, h] in pixels of the file
  let found = null; // the last answer
  let skip = 0;
  let told = ""; // what is said of the last answer
  let asked = null; // filters and region of the last answer: its other pages and its reasons have the same
  let patients = false; // each hit another patient
  let asking = null; // aborts the request under way
  let at = 0; // the hit in the viewer

  function node(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== false) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function look(width, height, boxes) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const set = (element, values) => Object.entries(values).forEach(([key, value]) => element.setAttribute(key, value));
    set(svg, { class: "look", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    for (const [kind, box] of boxes) {
      if (!box) continue;
      const [x, y, w, h] = box;
      const rect = document.createElementNS(svg.namespaceURI, "rect");
      set(rect, { class: kind, x, y, width: w, height: h });
      svg.append(rect);
    }
    return svg;
  }

  const crop = (box) => [["under", box], ["crop", box]];

  function chips(findings, shared) {
    const list = node("ul", { class: "chips" });
    for (const name of findings) {
      const both = shared.includes(name);
      const chip = node("li", { class: both ? "chip shared" : "chip" }, (both ? "\u2713 " : "") + label(name));
      if (both) chip.append(node("span", { class: "hidden" }, " (shared with the query)"));
      list.append(chip);
    }
    if (!findings.length) list.append(node("li", { class: "chip none" }, "No finding recorded"));
    return list;
  }

  function person(hit) {
    const parts = [hit.view, hit.age_years === null ? null : `${hit.age_years} years`, { F: "female", M: "male" }[hit.sex] || hit.sex];
    return parts.filter(Boolean).join(" \u00b7 ") || "View, age and sex unknown";
  }

  function about(hit) {
    const origin = node("p", { class: "origin" }, "Patient ", node("span", { class: "id" }, hit.patient));
    if (hit.study_date) origin.append(node("span", { class: "when" }, hit.study_date));
    return node(
      "div",
      { class: "about" },
      node(
        "p",
        { class: "place" },
        node("span", { class: "rank" }, node("span", { class: "hidden" }, "Rank "), String(hit.rank)),
        node("span", { class: "distance" }, `distance ${hit.distance.toFixed(3)}`),
      ),
      chips(hit.findings, hit.shared),
      node("p", { class: "person" }, person(hit)),
      origin,
      node("p", { class: "origin" }, node("span", { class: "hidden" }, "Image "), node("span", { class: "id" }, hit.image_id)),
    );
  }

  function picture(hit) {
    const alt = `Hit ${hit.rank}: chest X-ray, ${person(hit)}. Findings: ${hit.findings.map(label).join(", ") || "none recorded"}.`;
    const image = node("img", { src: hitUrl(hit.image_id, "thumbnail"), alt, decoding: "async" });
    return [image, look(found.image_side, found.image_side, crop(hit.crop))];
  }

  // ---- the query's picture, and the region drawn on it

  function queryPicture() {
    if (query.id !== undefined) {
      const image = node("img", { src: hitUrl(query.id, "thumbnail"), alt: `Query: indexed image ${query.id}` });
      return [image, found ? look(found.image_side, found.image_side, crop(found.query.crop)) : ""];
    }
    if (!query.bitmap) return [];
    const { width, height } = query.bitmap;
    const canvas = node("canvas", { width, height, role: "img", "aria-label": "Query: the chosen image" });
    canvas.getContext("2d").drawImage(query.bitmap, 0, 0);
    const looked = found && found.query.source_crop;
    return [canvas, look(width, height, [...crop(looked), ["under", query.region], ["drawn", query.region]])];
  }

  function drawQuery() {
    const stored = query.id !== undefined;
    $("asked").hidden = false;
    $("picture").dataset.kind = stored ? "stored" : "file";
    $("picture").hidden = !stored && !query.bitmap;
    $("picture").style.aspectRatio = query.bitmap ? `${query.bitmap.width} / ${query.bitmap.height}` : "1";
    $("picture").replaceChildren(...queryPicture());
    $("hint").textContent = stored
      ? `Indexed image ${query.id}.`
      : !query.bitmap
        ? "This browser cannot show the file; it is searched with all the same."
        : !index.regions
          ? "This index holds whole images: it cannot be searched by region."
          : query.region
            ? "Enter or Search looks closely at the box. Arrows move it, Shift and arrows size it, Escape removes it."
            : "Draw a box to look closely at a part. With the keyboard: Enter puts one in the middle.";
    const known = found && found.query.known_as;
    $("known").replaceChildren(...(known ? [chips(known.findings, []), node("p", { class: "person" }, person(known))] : []));
    const scores = Object.entries((found && found.query.scores) || {}).sort((a, b) => b[1] - a[1]).slice(0, 6);
    const bars = scores.map(([name, score]) => {
      const bar = node("b");
      bar.style.width = `${score * 100}%`;
      return node("li", {}, node("span", {}, label(name)), node("i", { "aria-hidden": "true" }, bar), node("span", { class: "number" }, `${Math.round(score * 100)}%`));
    });
    const title = "Probabilities of the model (not a diagnosis)";
    $("scores").replaceChildren(...(bars.length ? [node("p", { class: "label" }, title), node("ul", {}, ...bars)] : []));
  }

  const drawable = () => query && query.bitmap && index.regions;

  function place(event) {
    const frame = $("picture").getBoundingClientRect();
    const part = (value, length) => Math.min(Math.max(value / length, 0), 1);
    return [
      part(event.clientX - frame.left, frame.width) * query.bitmap.width,
      part(event.clientY - frame.top, frame.height) * query.bitmap.height,
    ].map(Math.round);
  }

  let corner = null;
  $("picture").addEventListener("pointerdown", (event) => {
    if (!drawable() || event.button !== 0) return;
    event.preventDefault();
    $("picture").focus();
    $("picture").setPointerCapture(event.pointerId);
    corner = place(event);
  });
  $("picture").addEventListener("pointermove", (event) => {
    if (!corner) return;
    const [x, y] = place(event);
    query.region = [Math.min(x, corner[0]), Math.min(y, corner[1]), Math.abs(x - corner[0]), Math.abs(y - corner[1])];
    drawQuery();
  });
  $("picture").addEventListener("pointerup", () => {
    if (!corner) return;
    corner = null;
    // A click is no box: it takes away the one that is there.
    if (query.region && Math.min(query.region[2], query.region[3]) < query.bitmap.width / 50) query.region = null;
    drawQuery();
  });
  $("picture").addEventListener("pointercancel", () => (corner = null));

  $("picture").addEventListener("keydown", (event) => {
    if (!drawable()) return;
    const { width, height } = query.bitmap;
    const step = Math.max(1, Math.round(Math.min(width, height) / 50));
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (event.key === "Enter") {
      event.preventDefault();
      if (query.region) return search(0);
      query.region = [width / 3, height / 3, width / 3, height / 3].map(Math.round);
    } else if (event.key === "Escape") {
      query.region = null;
    } else if (way && query.region) {
      event.preventDefault();
      const [x, y, w, h] = query.region;
      const within = (value, least, most) => Math.min(Math.max(value, least), most);
      query.region = event.shiftKey
        ? [x, y, within(w + way[0], step, width - x), within(h + way[1], step, height - y)]
        : [within(x + way[0], 0, width - w), within(y + way[1], 0, height - h), w, h];
    } else return;
    drawQuery();
  });

  // ---- asking

  // A browser turns a PNG as its EXIF says, also where it is asked not to; the server turns JPEG only.
  async function asTheServerSees(file) {
    const bytes = new DataView(await file.arrayBuffer());
    if (bytes.byteLength < 8 || bytes.getUint32(0) !== 0x89504e47) return file;
    const kept = [];
    let from = 0;
    for (let at = 8, next; at + 8 <= bytes.byteLength; at = next) {
      next = at + 12 + bytes.getUint32(at);
      if (bytes.getUint32(at + 4) !== 0x65584966) continue; // eXIf
      kept.push(file.slice(from, at));
      from = next;
    }
    return new Blob([...kept, file.slice(from)], { type: "image/png" });
  }

  async function choose(file) {
    if (!index) return;
    if (file.size > index.upload_bytes) {
      return say(`This file is larger than ${index.upload_bytes / 2 ** 20} MB, the most that the server takes.`);
    }
    // A browser may not know the format.
    const bitmap = await asTheServerSees(file).then((seen) => createImageBitmap(seen)).catch(() => null);
    query = { file, bitmap, region: null };
    found = null;
    search(0);
  }

  function filters() {
    const pairs = [];
    for (const box of document.querySelectorAll("#views input:checked")) pairs.push(["view", box.value]);
    for (const id of ["sex", "age_from", "age_to", "date_from", "date_to", "without_patient"]) {
      if ($(id).value) pairs.push([id, $(id).value.trim()]);
    }
    for (const choice of document.querySelectorAll("#findings select")) {
      if (choice.value) pairs.push([choice.value, choice.dataset.finding]);
    }
    for (const id of ["own_patient", "one_per_patient"]) if ($(id).checked) pairs.push([id, "true"]);
    return pairs;
  }

  function say(text) {
    $("problem").textContent = text;
  }

  async function ask(url, options) {
    const response = await fetch(url, options).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached. Is it still running?");
    });
    const answer = await response.json().catch(() => ({ detail: `The server answered ${response.status}.` }));
    if (!response.ok) throw new Error(answer.detail);
    return answer;
  }

  function upload(pairs, region) {
    const form = new FormData();
    for (const [name, value] of pairs) form.append(name, value);
    form.append("image", query.file);
    if (region) form.append("region", region.join(","));
    return { method: "POST", body: form };
  }

  async function search(from, wanted = { filters: filters(), region: query?.region }) {
    if (!query) return say("Choose an image first.");
    drawQuery();
    if (!found) {
      $("hits").replaceChildren(); // of another query
      $("pager").hidden = true;
    }
    asking?.abort();
    const mine = (asking = new AbortController());
    $("answers").classList.add("busy");
    $("status").textContent = "Searching\u2026";
    try {
      const signal = mine.signal;
      const pairs = [["k", PAGE], ["skip", from], ...wanted.filters];
      found = await (query.id === undefined
        ? ask("/v1/search", { ...upload(pairs, wanted.region), signal })
        : ask(`${hitUrl(query.id, "similar")}?${new URLSearchParams(pairs)}`, { signal }));
      skip = from;
      asked = wanted;
      patients = wanted.filters.some(([name]) => name === "one_per_patient");
      say("");
      show();
    } catch (error) {
      if (error.name === "AbortError") return;
      $("status").textContent = found ? told : "";
      say(error.message);
    }
    $("answers").classList.remove("busy");
  }

  function show() {
    drawQuery();
    const { hits, passing } = found;
    const sentence = (text) => text[0].toUpperCase() + text.slice(1) + ".";
    $("warning").textContent = found.warning ? sentence(found.warning) : "";
    const sharing = hits.filter((hit) => hit.shared.length).length;
    const share = found.query.known_as?.findings.length ? `; ${sharing} of these ${sharing === 1 ? "shares" : "share"} a finding with the query` : "";
    const images = `${passing.toLocaleString("en")} images`; // how many patients these are of, the server does not count
    $("status").textContent = told = hits.length
      ? `${hits[0].rank} to ${hits.at(-1).rank} of ${patients ? `the patients of ${images}` : images}, nearest first${share}.`
      : skip ? `No more ${patients ? "patients" : "images"}: the page before is the last.` : "";
    $("hits").replaceChildren(
      ...hits.map((hit, number) => {
        const film = node("button", { type: "button", class: "film", title: "Look closer", "data-hit": number }, ...picture(hit));
        return node("li", { class: "hit" }, film, about(hit));
      }),
    );
    const last = hits.length < PAGE || skip + PAGE >= Math.min(passing, 900);
    $("pager").hidden = skip === 0 && last;
    $("page").textContent = `Page ${skip / PAGE + 1}`;
    $("previous").disabled = skip === 0;
    $("next").disabled = last;
  }

  // ---- looking closer

  async function view(number) {
    at = number;
    const hit = found.hits[at];
    const why = node("div", { id: "why", "aria-live": "polite" });
    const beside = node("div", { class: "side" }, node("div", { class: "film" }, ...queryPicture()), node("div", { class: "about" }, "Query"));
    if (query.bitmap) beside.firstChild.style.aspectRatio = $("picture").style.aspectRatio;
    const side = node("div", { class: "side" }, node("div", { class: "film" }, ...picture(hit)), about(hit));
    $("sides").replaceChildren(beside, side, why);
    $("position").textContent = `Query and hit ${hit.rank}`;
    document.querySelector('[data-do="previous"]').disabled = at === 0;
    document.querySelector('[data-do="next"]').disabled = at === found.hits.length - 1;
    if (!$("viewer").open) $("viewer").showModal();
    try {
      const reason = await (query.id === undefined
        ? ask(hitUrl(hit.image_id, "why"), upload([], asked.region))
        : ask(`${hitUrl(hit.image_id, "why")}?${new URLSearchParams({ query: query.id })}`));
      const rows = Object.entries(reason.distances).map(([name, distance]) => {
        const bar = node("b");
        bar.style.width = `${Math.min(distance / 2, 1) * 100}%`;
        const cell = node("td", {}, node("i", { "aria-hidden": "true" }, bar));
        const title = name.replace(/^step(\d)$/, "Step $1").replace("_", " and ");
        return node("tr", {}, node("th", { scope: "row" }, title), node("td", { class: "number" }, distance.toFixed(3)), cell);
      });
      const note = "Distance to the query in each step and embedding: 0 is the same, 2 the opposite.";
      why.replaceChildren(node("p", { class: "note" }, note), node("table", {}, ...rows));
    } catch (error) {
      why.replaceChildren(node("p", { class: "warning" }, error.message));
    }
  }

  const actions = {
    previous: () => at > 0 && view(at - 1),
    next: () => at < found.hits.length - 1 && view(at + 1),
    close: () => $("viewer").close(),
    ask: () => {
      query = { id: found.hits[at].image_id };
      found = null;
      $("viewer").close();
      search(0);
    },
  };

  document.addEventListener("click", (event) => {
    const film = event.target.closest("[data-hit]");
    if (film) view(Number(film.dataset.hit));
    const action = event.target.closest("[data-do]");
    if (action) actions[action.dataset.do]();
  });
  $("viewer").addEventListener("keydown", (event) => {
    const name = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
    if (name) actions[name]();
  });
  $("viewer").addEventListener("close", () => $("hits").querySelectorAll(".film")[at]?.focus());
  $("hits").addEventListener("keydown", (event) => {
    const films = [...$("hits").querySelectorAll(".film")];
    const columns = films.filter((film) => film.offsetTop === films[0].offsetTop).length;
    const way = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    const next = films[films.indexOf(document.activeElement) + way];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
  $("previous").addEventListener("click", () => search(skip - PAGE, asked));
  $("next").addEventListener("click", () => search(skip + PAGE, asked));
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    search(0);
  });
  $("form").addEventListener("reset", () => setTimeout(() => query && search(0)));
  $("file").addEventListener("change", () => $("file").files[0] && choose($("file").files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    if (event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => event.clipboardData.files[0] && choose(event.clipboardData.files[0]));

  // ---- what the index has

  async function begin() {
    index = await ask("/v1/index");
    for (const view of index.views) {
      $("views").append(node("label", {}, node("input", { type: "checkbox", value: view }), ` ${view}`));
    }
    for (const sex of index.sexes) $("sex").append(node("option", { value: sex }, { F: "female", M: "male" }[sex] || sex));
    $("dates").hidden = !index.dated;
    for (const finding of index.findings) {
      const id = `finding-${finding}`;
      const options = [["", "-"], ["any_of", "any of"], ["all_of", "all of"], ["none_of", "none of"]];
      const choices = options.map(([value, text]) => node("option", { value }, text));
      $("findings").append(node("label", { for: id }, label(finding)), node("select", { id, "data-finding": finding }, ...choices));
    }
    $("index").textContent = `Index ${index.name}, ${index.images.toLocaleString("en")} images, version ${index.version}.`;
    document.documentElement.dataset.page = "ready";
  }

  begin().catch((error) => say(error.message));
})();
