"""Model directories: conversion of public weights and models, downloads, uploads to the Hub."""
