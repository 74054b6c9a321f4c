// A field for one image: chosen, dropped or pasted. The file goes to the server as a data URI.
const most = Number(props.most);
const input = element.querySelector("input");
const send = (file) => {
  if (!file) return;
  if (file.size > most) {
    trigger("upload", { data: "", problem: `the file is larger than ${Math.floor(most / 2 ** 20)} MB` });
    return;
  }
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { data: reader.result, problem: "" });
  reader.onerror = () => trigger("upload", { data: "", problem: "the file cannot be read" });
  reader.readAsDataURL(file);
};
input.addEventListener("change", () => { send(input.files[0]); input.value = ""; });
element.addEventListener("dragover", (event) => { event.preventDefault(); element.classList.add("over"); });
element.addEventListener("dragleave", () => element.classList.remove("over"));
element.addEventListener("drop", (event) => {
  event.preventDefault();
  element.classList.remove("over");
  send(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (element.offsetParent !== null && event.clipboardData.files[0]) send(event.clipboardData.files[0]);
});
