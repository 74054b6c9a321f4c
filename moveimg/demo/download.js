(data) => {
  if (!data) return "";
  const link = document.createElement("a");
  link.href = "data:application/zip;base64," + data;
  link.download = "moveimg.zip";
  link.click();
  return "";
}
