// The canvas over the image is the mask: painted parts of the image are redrawn.
const find = (selector) => element.querySelector(selector);
const pen = () => find("canvas").getContext("2d");
let last = null; // the end of the current stroke
useImage = (data) => { find(".painter img").src = data; };
const place = ({ clientX, clientY }) => {
  const canvas = find("canvas"), box = canvas.getBoundingClientRect();
  return [(clientX - box.left) / box.width * canvas.width, (clientY - box.top) / box.height * canvas.height];
};
const stroke = (event) => {
  const to = place(event), context = pen();
  context.globalCompositeOperation = event.shiftKey ? "destination-out" : "source-over";
  context.strokeStyle = "#e11d74";
  context.lineWidth = find("input[type=range]").value / 100 * find("canvas").width;
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(...last);
  context.lineTo(...to);
  context.stroke();
  last = to;
};
element.addEventListener("pointerdown", (event) => {
  if (!event.target.matches("canvas")) return;
  event.target.setPointerCapture(event.pointerId);
  last = place(event);
  stroke(event);
});
element.addEventListener("pointermove", (event) => last && stroke(event));
for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, () => { last = null; });
// Keeping a half paints over the other half, up to the border of a code.
element.addEventListener("click", (event) => {
  const keep = event.target.dataset.keep;
  if (!keep) return;
  const { width, height } = find("canvas"), { rows, columns } = find(".painter").dataset;
  const x = Math.floor(columns / 2) / columns * width, y = Math.floor(rows / 2) / rows * height;
  const painted = { top: [0, y, width, height], bottom: [0, 0, width, y], left: [x, 0, width, height],
    right: [0, 0, x, height], clear: [0, 0, 0, 0] };
  const context = pen();
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "#e11d74";
  context.clearRect(0, 0, width, height);
  context.fillRect(...painted[keep]);
});
// Return the image, and the mask as a PNG, white where the image is redrawn.
window.painted = () => {
  const mask = find("canvas").cloneNode(), context = mask.getContext("2d");
  context.drawImage(find("canvas"), 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "white";
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "black";
  context.fillRect(0, 0, mask.width, mask.height);
  return [find(".painter img").getAttribute("src") ?? "", mask.toDataURL()];
};
