// Loads the page again until its answer is there.
setTimeout(() => location.reload(), 1200);
